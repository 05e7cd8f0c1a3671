"""What a recipe says to an engine before its first model."""

from __future__ import annotations

from diptych.engine import EngineSettings
from diptych.layout import Layout, MeshShape, Zero
from diptych.recipe.schema import DecodeMeshRecipe, Recipe, TrainMeshRecipe, ZeroRecipe


def engine_settings(recipe: Recipe, *, distributed: bool = False) -> EngineSettings:
    """The settings of a run of `recipe`; distributed: as one of several processes."""
    return EngineSettings(
        precision=recipe.precision,
        remat=recipe.layout.remat,
        layout=layout(recipe),
        attention=recipe.layout.attention,
        distributed=distributed,
        rollout=recipe.rollout.engine,
        deepspeed=recipe.deepspeed,
    )


def layout(recipe: Recipe) -> Layout:
    """The meshes that the recipe asks for."""
    wanted = recipe.layout
    chunk = wanted.switch.chunk_mb
    return Layout(
        train=_mesh(wanted.train),
        decode=_mesh(wanted.decode),
        critic=wanted.critic and _mesh(wanted.critic),
        reference=wanted.reference and _mesh(wanted.reference),
        reward=wanted.reward and _mesh(wanted.reward),
        offload=wanted.offload,
        switch_chunk=None if chunk is None else chunk * 2**20,
        switch_check=wanted.switch.check,
        zero=_zero(wanted.zero),
        zero_critic=wanted.zero_critic and _zero(wanted.zero_critic),
        zero_reference=wanted.zero_reference and _zero(wanted.zero_reference),
        zero_reward=wanted.zero_reward and _zero(wanted.zero_reward),
    )


def _zero(wanted: ZeroRecipe) -> Zero:
    return Zero(
        stage=wanted.stage,
        offload_optimizer=wanted.offload_optimizer == "cpu",
        offload_param=wanted.offload_param == "cpu",
    )


def _mesh(wanted: TrainMeshRecipe | DecodeMeshRecipe) -> MeshShape:
    fsdp = wanted.fsdp if isinstance(wanted, TrainMeshRecipe) else 1
    return MeshShape(data=wanted.data, fsdp=fsdp, tensor=wanted.tensor)
