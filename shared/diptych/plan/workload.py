"""What a recipe asks of the machine: its models, where each lies, and the shapes of its batches. Only config.json files
are read: no weights, tokenizer or data. Rows are as long as the recipe allows (or as the longest that is known), and
every response takes all its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from diptych.weights.adapters import read_adapter_spec
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
    """An iteration of rl. rows: responses. evaluated: responses of an evaluation, at most. micro: rows that go through
    a model at once. prompt, new: columns. steps: optimizer steps of policy and critic, of mini_rows rows each.
    reference: None where it is the policy without its adapter. reward: None where a function scores."""

    policy: Held
    critic: Held
    reference: Held | None
    reward: Held | None
    rows: int
    evaluated: int
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


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a run that is about to start has read already. models: of "sft", "reward", "policy" and "reward_model", in
    place of the recipe's directories. longest: tokens of a stage's longest row (of rl: of its longest prompt), in place
    of what the recipe allows."""

    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)


NOTHING = Known()


def read_workload(
    recipe: Recipe,
    topology: Topology | None,
    *,
    search: bool = False,
    known: Known = NOTHING,
) -> Workload:
    """The recipe on this machine. UserError where a mesh does not fill it or does not divide a model.

    topology: None for the torch engine, which has no meshes (`layout.decode.tensor` apart) and counts models whole.
    search: the train and decode meshes are still to be found; the recipe's do not matter.
    """
    settings = engine_settings(recipe)
    layout = settings.layout
    if topology is None:
        whole, decode = MeshShape(), MeshShape(tensor=layout.decode.tensor)
        layout = replace(layout, train=whole, decode=decode, critic=None, reference=None, reward=None)
        return _workload(recipe, replace(settings, layout=layout), search, known)
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
    return _workload(recipe, replace(settings, layout=layout), search, known)


def _workload(recipe: Recipe, settings: EngineSettings, search: bool, known: Known) -> Workload:
    layout = settings.layout
    return Workload(
        name=recipe.name,
        settings=settings,
        chunk=recipe.logprob_chunk,
        supervised=tuple(
            _supervised(recipe, stage, layout, search, known) for stage in recipe.stages if stage in ("sft", "reward")
        ),
        rollouts=_rollouts(recipe, layout, search, known) if "rl" in recipe.stages else None,
    )


def _supervised(recipe: Recipe, stage: Stage, layout: Layout, search: bool, known: Known) -> Supervised:
    chosen = recipe.sft if stage == "sft" else recipe.reward
    ways = 1 if stage == "sft" else 2
    path = recipe.reward.model_path if stage == "reward" else None
    held = _held(
        recipe, layout, search, name="policy" if stage == "sft" else "reward model", role="policy", path=path,
        config=known.models.get(stage),
        head="lm" if stage == "sft" else "scalar", optimizer=optimizer_spec(chosen.optimizer), adapter=chosen.adapter,
    )  # fmt: skip
    longest = known.longest.get(stage, recipe.data.max_prompt_tokens + recipe.data.max_response_tokens)
    columns = bucket(longest, recipe.data.buckets)
    micro = min(chosen.micro_batch_size, chosen.batch_size)
    return Supervised(stage=stage, model=held, rows=chosen.batch_size * ways, micro=micro * ways, columns=columns)


def _rollouts(recipe: Recipe, layout: Layout, search: bool, known: Known) -> Rollouts:
    rl = recipe.rl
    language: dict[str, Any] = {"recipe": recipe, "layout": layout, "search": search, "head": "lm"}
    language |= {"path": rl.policy_path, "config": known.models.get("policy")}
    policy_optimizer = optimizer_spec(rl.optimizer, ema_decay=rl.ema_decay)
    policy = _held(**language, name="policy", role="policy", optimizer=policy_optimizer, adapter=rl.adapter)
    scalar: dict[str, Any] = {**language, "head": "scalar"}
    has_model = rl.reward.function is None
    if has_model:
        path = rl.reward.model_path or recipe.reward.model_path
        scalar |= {"path": path, "config": known.models.get("reward_model")}
    critic = _held(
        **scalar, name="critic", role="critic", optimizer=optimizer_spec(rl.optimizer), adapter=rl.critic_adapter
    )
    reward = _held(**scalar, name="reward", role="reward") if has_model else None
    below = rl.adapter is not None and rl.adapter.path is None
    reference = None if below else _held(**language, name="reference", role="reference")
    longest = known.longest.get("rl", recipe.data.max_prompt_tokens)
    prompt, new = bucket(longest, recipe.data.buckets), recipe.rollout.max_new_tokens
    check_reach(policy.config, prompt=longest, new=new)
    if not search:
        check_slots(model_slots(policy.config, "lm"), layout.decode, key="layout.decode", rules=DECODE_RULES)
    rows = rl.batch_size * rl.samples_per_prompt
    return Rollouts(
        policy=policy,
        critic=critic,
        reference=reference,
        reward=reward,
        rows=rows,
        evaluated=rl.eval_prompts,
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
            decode_rows=recipe.rollout.decode_rows,
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
    config: ModelConfig | None,
    head: Head,
    optimizer: OptimizerSpec | None = None,
    adapter: AdapterRecipe | None = None,
) -> Held:
    if config is None:
        fields, where = _config(recipe, path)
        config = read_model(fields, where=where)
    mesh = layout.of(role)
    if not search or mesh is not layout.train:
        check_slots(model_slots(config, "lm"), mesh, key=layout.key_of(role))
    spec = None if adapter is None else _adapter(adapter)
    balance = 0.0
    if isinstance(config, DecoderConfig) and config.experts is not None:
        wanted = recipe.model.balance_coef
        balance = config.experts.balance_coef if wanted is None else wanted
    return Held(
        name=name, role=role, config=config, head=head, optimizer=optimizer, mesh=mesh, adapter=spec, balance=balance,
        offloaded=role in layout.offload,
    )  # fmt: skip


def _adapter(recipe: AdapterRecipe) -> AdapterSpec:
    """What decides an adapter's size: the one that it goes on from, or the recipe (also of one that an earlier stage
    has yet to leave)."""
    if recipe.path is not None and Path(recipe.path).is_dir():
        return read_adapter_spec(Path(recipe.path))
    return AdapterSpec(rank=recipe.rank, alpha=recipe.alpha, targets=recipe.targets)


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
