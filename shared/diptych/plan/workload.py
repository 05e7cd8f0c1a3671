"""What a recipe asks of the machine: its models, where each lies, and the shapes of its batches. Only config.json files
are read: no weights, tokenizer or data. Rows are as long as the recipe allows, and every response takes all its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.data.batches import bucket
from diptych.engine import MASTERS, AdapterSpec, EngineSettings, Head, OptimizerSpec, Role, Sampling
from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, check_reach, model_slots, read_model
from diptych.layout import DECODE_RULES, Layout, MeshShape, check_slots, resolve
from diptych.plan.hardware import Topology
from diptych.recipe.new_model import new_model_config
from diptych.recipe.schema import AdapterRecipe, Recipe, Stage
from diptych.recipe.settings import engine_settings
from diptych.stages.context import optimizer_spec
from diptych.weights.huggingface import read_config


@dataclass(frozen=True, kw_only=True)
class Held:
    """One model on the machine. name: of its part in the report. optimizer: None for a frozen one. balance: weight of
    the balance loss of its experts."""

    name: str
    role: Role
    config: ModelConfig
    head: Head
    optimizer: OptimizerSpec | None
    mesh: MeshShape
    adapter: AdapterSpec | None = None
    balance: float = 0.0
    offloaded: bool = False


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """An optimizer step of sft or reward. rows, micro: of the whole machine (a pair is two rows)."""

    stage: Stage
    model: Held
    rows: int
    micro: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """An iteration of rl. rows: responses. micro: rows that go through a model at once. prompt, new: columns. steps:
    optimizer steps of policy and critic, of mini_rows rows each. reference: None where it is the policy without its
    adapter. reward: None where a function scores."""

    policy: Held
    critic: Held
    reference: Held | None
    reward: Held | None
    rows: int
    micro: int
    prompt: int
    new: int
    steps: int
    mini_rows: int
    decode: MeshShape
    sampling: Sampling

    @property
    def columns(self) -> int:
        return self.prompt + self.new

    @property
    def models(self) -> list[Held]:
        return [one for one in (self.policy, self.critic, self.reference, self.reward) if one is not None]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that is planned. settings: the engine's. chunk: tokens of a device whose logits exist at once."""

    name: str
    settings: EngineSettings
    chunk: int
    supervised: tuple[Supervised, ...]
    rollouts: Rollouts | None

    @property
    def compute(self) -> str:
        """The type of activations and matrix products."""
        return self.settings.precision

    @property
    def masters(self) -> str:
        """The type of trained weights and of moments; frozen models are kept in `compute`."""
        return MASTERS[self.settings.precision]

    def stored(self, held: Held) -> str:
        """The type of a model's weights."""
        return self.compute if held.optimizer is None else self.masters


def read_workload(recipe: Recipe, topology: Topology, *, search: bool = False) -> Workload:
    """The recipe on this machine. UserError where a mesh does not fill it or does not divide a model.

    search: the train and decode meshes are still to be found; the recipe's do not matter.
    """
    settings = engine_settings(recipe)
    layout = settings.layout
    if search:
        layout = replace(layout, train=MeshShape(fsdp=-1), decode=MeshShape(data=-1))
    roles = {"critic": layout.critic, "reference": layout.reference, "reward": layout.reward}
    filled = {
        role: None if mesh is None else resolve(mesh, topology.num_chips, key=f"layout.{role}")
        for role, mesh in roles.items()
    }
    layout = replace(
        layout,
        train=resolve(layout.train, topology.num_chips, key="layout.train"),
        decode=resolve(layout.decode, topology.num_chips, key="layout.decode"),
        **filled,
    )
    settings = replace(settings, layout=layout)
    return Workload(
        name=recipe.name,
        settings=settings,
        chunk=recipe.logprob_chunk,
        supervised=tuple(
            _supervised(recipe, stage, layout, search) for stage in recipe.stages if stage in ("sft", "reward")
        ),
        rollouts=_rollouts(recipe, layout, search) if "rl" in recipe.stages else None,
    )


def _supervised(recipe: Recipe, stage: Stage, layout: Layout, search: bool) -> Supervised:
    chosen = recipe.sft if stage == "sft" else recipe.reward
    ways = 1 if stage == "sft" else 2
    path = recipe.reward.model_path if stage == "reward" else None
    held = _held(
        recipe, layout, search, name="policy" if stage == "sft" else "reward model", role="policy", path=path,
        stage=stage,
        head="lm" if stage == "sft" else "scalar", optimizer=optimizer_spec(chosen.optimizer), adapter=chosen.adapter,
    )  # fmt: skip
    columns = bucket(recipe.data.max_prompt_tokens + recipe.data.max_response_tokens, recipe.data.buckets)
    micro = min(chosen.micro_batch_size, chosen.batch_size)
    return Supervised(stage=stage, model=held, rows=chosen.batch_size * ways, micro=micro * ways, columns=columns)


def _rollouts(recipe: Recipe, layout: Layout, search: bool) -> Rollouts:
    rl = recipe.rl
    options: dict[str, Any] = {"recipe": recipe, "layout": layout, "search": search, "stage": "rl"}
    policy_optimizer = optimizer_spec(rl.optimizer, ema_decay=rl.ema_decay)
    policy = _held(
        **options, name="policy", role="policy", path=rl.policy_path, head="lm", optimizer=policy_optimizer,
        adapter=rl.adapter,
    )  # fmt: skip
    has_model = rl.reward.function is None
    scalar_path = (rl.reward.model_path or recipe.reward.model_path) if has_model else rl.policy_path
    critic = _held(
        **options, name="critic", role="critic", path=scalar_path, head="scalar",
        optimizer=optimizer_spec(rl.optimizer), adapter=rl.critic_adapter,
    )  # fmt: skip
    reward = _held(**options, name="reward", role="reward", path=scalar_path, head="scalar") if has_model else None
    below = rl.adapter is not None and rl.adapter.path is None
    reference = None if below else _held(**options, name="reference", role="reference", path=rl.policy_path, head="lm")
    prompt, new = bucket(recipe.data.max_prompt_tokens, recipe.data.buckets), recipe.rollout.max_new_tokens
    check_reach(policy.config, prompt=recipe.data.max_prompt_tokens, new=new)
    if not search:
        check_slots(model_slots(policy.config, "lm"), layout.decode, key="layout.decode", rules=DECODE_RULES)
    rows = rl.batch_size * rl.samples_per_prompt
    return Rollouts(
        policy=policy,
        critic=critic,
        reference=reference,
        reward=reward,
        rows=rows,
        micro=min(rl.micro_batch_size, rows // rl.mini_batches),
        prompt=prompt,
        new=new,
        steps=rl.epochs * rl.mini_batches,
        mini_rows=rows // rl.mini_batches,
        decode=layout.decode,
        sampling=Sampling(
            temperature=recipe.rollout.temperature,
            top_k=recipe.rollout.top_k,
            top_p=recipe.rollout.top_p,
            max_new_tokens=new,
            stop_token_ids=(0,),
        ),
    )


def _held(
    recipe: Recipe,
    layout: Layout,
    search: bool,
    *,
    name: str,
    role: Role,
    path: str | None,
    stage: Stage,
    head: Head,
    optimizer: OptimizerSpec | None = None,
    adapter: AdapterRecipe | None = None,
) -> Held:
    fields, where = _config(recipe, path)
    config = read_model(fields, where=where)
    mesh = layout.of(role)
    if not search or mesh is not layout.train:
        check_slots(model_slots(config, "lm"), mesh, key=layout.key_of(role))
    if adapter is not None and adapter.path is not None:
        raise UserError(
            f"{stage}: plan takes new adapters only; set adapter.path to null and rank and targets to its own"
        )
    spec = None if adapter is None else AdapterSpec(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    balance = 0.0
    if isinstance(config, DecoderConfig) and config.experts is not None:
        wanted = recipe.model.balance_coef
        balance = config.experts.balance_coef if wanted is None else wanted
    return Held(
        name=name, role=role, config=config, head=head, optimizer=optimizer, mesh=mesh, adapter=spec, balance=balance,
        offloaded=role in layout.offload,
    )  # fmt: skip


def _config(recipe: Recipe, path: str | None) -> tuple[Mapping[str, Any], str]:
    """A config.json and where it is: of a directory that the recipe names, or of its new model."""
    directory = path or recipe.model.path
    if directory is not None:
        return read_config(Path(directory)), str(Path(directory) / "config.json")
    if recipe.model.new is None:
        raise UserError(f"{recipe.name}: 'model.path': plan needs a directory with a config.json, or 'model.new'")
    return new_model_config(recipe.model.new), "model.new"


def filled(micro: int, mesh: MeshShape) -> int:
    """Rows of a micro-batch as the engine fills it up: a multiple of the devices that read rows of their own."""
    return -(-micro // mesh.rows) * mesh.rows
