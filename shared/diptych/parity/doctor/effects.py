"""What a difference between two setups changes, and whether it can change a number at all.

    number    can change what is computed: counts
    rounding  sums in another order, other kernels or library versions: last digits, which every comparison here
              allows for (in float32 they grow by the dynamics of training); a note, which does not count
    nothing   names, places, times: listed apart

Versions and hardware are notes, and not differences that count: two machines never agree in all of them, both engines'
packages always differ, and a check that is red everywhere is not read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diptych.engine import ENGINES
from diptych.families.family import family, supported_families
from diptych.families.fields import IDLE
from diptych.parity.doctor.setups import Setup
from diptych.parity.doctor.vocabulary import MEANINGS, ROUNDING
from diptych.recipe.json_schema import field_docs
from diptych.recipe.load import hints, without_none
from diptych.recipe.schema import Recipe

Effect = Literal["number", "rounding", "nothing"]

_NOTHING = (
    "name",
    "checkpoint.",
    "rollout.gate",
    "rollout.decode_rows",
    "sft.eval_every",
    "reward.eval_every",
    "rl.eval_every",
)
_ROUNDING = (
    "layout.", "logprob_chunk", "data.buckets", "data.packing", "rollout.engine", "sft.micro_batch_size",
    "reward.micro_batch_size", "rl.micro_batch_size",
)  # fmt: skip
_STAGES = ("sft", "reward", "rl")
# Fields of a config.json, by what they change; a field that is not here changes the model's output in its own way.
_FIELDS: Mapping[str, str] = {
    "model_type": "the architecture", "vocab_size": "the width of the output", "hidden_size": "every tensor",
    "n_embd": "every tensor", "num_hidden_layers": "the depth", "n_layer": "the depth",
    "num_attention_heads": "how the width is cut into heads", "n_head": "how the width is cut into heads",
    "num_key_value_heads": "which heads share keys and values", "head_dim": "width and scale of attention",
    "intermediate_size": "the MLP's width", "n_inner": "the MLP's width", "ffn_dim": "the MLP's width",
    "hidden_act": "every MLP", "activation_function": "every MLP", "hidden_activation": "every MLP",
    "rms_norm_eps": "every norm", "layer_norm_eps": "every norm", "layer_norm_epsilon": "every norm",
    "tie_word_embeddings": "the output projection", "rope_theta": "positions", "rope_scaling": "long positions",
    "partial_rotary_factor": "how many columns are rotated", "sliding_window": "how far attention reaches",
    "attention_bias": "biases of attention", "mlp_bias": "biases of the MLP", "initializer_range": "initial weights",
    "max_position_embeddings": "the longest sequence", "attention_dropout": "training, unless the trainer sets it to 0",
}  # fmt: skip


def effect_of(group: str, key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    """The effect of a difference in (group, key), and what it changes in words."""
    return _EFFECTS.get(group, _whatever)(key, a, b)


def model_effect(field: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    """The same for a field of config.json."""
    ours = a.is_ours and b.is_ours
    last = field.split(".")[-1]
    if field in _dropouts():
        why = "training, unless the trainer sets it to 0"
        return ("nothing", "dropout, which both engines set to 0") if ours else ("number", why)
    if field.endswith("_token_id"):
        return "number", "what ends, begins or fills a row"
    if field in ("dtype", "torch_dtype"):
        return ("nothing", "the type of the stored weights") if ours else ("number", "the precision of loading")
    if field in ("attn_implementation", "_attn_implementation_autoset"):
        return "rounding", "the attention kernel"
    if field.split(".")[0] in IDLE and field not in ("model_type", "router_aux_loss_coef"):
        return "nothing", "nothing that a language model computes"
    if field.startswith(("rope_parameters", "rope_scaling")):
        return "number", "positions"
    return "number", _FIELDS.get(last, "what the model computes")


def is_beside_the_model(field: str) -> bool:
    """A field that reaches numbers without being part of what the model computes from its tokens in evaluation."""
    return field in _dropouts() or field.endswith("_token_id") or field in ("dtype", "torch_dtype")


def _recipe(key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    words = _words(key)
    stages = {stage for setup in (a, b) if setup.recipe is not None for stage in setup.recipe.stages}
    if key.split(".")[0] in _STAGES and key.split(".")[0] not in stages:
        return "nothing", f"{words} (neither runs this stage)"
    if any(key == one or (one.endswith(".") and key.startswith(one)) for one in _NOTHING):
        return "nothing", words
    if any(key == one or (one.endswith(".") and key.startswith(one)) for one in _ROUNDING):
        return "rounding", words
    if _same_content(key, a, b):
        return "nothing", f"{words} (the contents are the same)"
    return "number", words


def _same_content(key: str, a: Setup, b: Setup) -> bool:
    """Two places, one content: the checksums of both sides are known and equal."""
    parts = key.split(".")
    if parts[0] == "data" and parts[-1] in ("path", "eval_path") and len(parts) == 3:
        group, content = "data", f"{parts[1]}/{'file' if parts[-1] == 'path' else 'held_out_file'}"
    else:
        roles = {"model.path": "base", "rl.policy_path": "policy", "rl.reward.model_path": "reward"}
        if key not in roles:
            return False
        group, content = "weights", roles[key]
    left, right = a.get(group, content), b.get(group, content)
    return left is not None and right is not None and left.value == right.value


def _settings(key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    return ("rounding" if key in ROUNDING else "number"), MEANINGS.get(key, "as the trainer's documentation says")


def _precision(key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    if key == "deterministic_algorithms":
        return "rounding", "whether a run repeats itself bit by bit"
    return "number", MEANINGS.get(key, "precision of what is computed")


def _variables(key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    if key.endswith("_CACHE_DIR") or key in (
        "DIPTYCH_PROGRESS",
        "CUDA_VISIBLE_DEVICES",
        "DIPTYCH_COMPILATION_CACHE",
        "TF_CPP_MIN_LOG_LEVEL",
    ):
        return "nothing", "nothing that is computed"
    if key.startswith(("OMP_", "MKL_", "OPENBLAS_", "NCCL_", "CUBLAS_", "CUDA_", "DIPTYCH_", "DS_", "DEEPSPEED_")):
        return "rounding", "threads, devices and order of sums"
    for starts, reader in ((("JAX_", "XLA_", "LIBTPU_"), "jax"), (("TORCH", "PYTORCH_"), "torch")):
        others = [setup.engine for setup in (a, b) if setup.engine in ENGINES and setup.engine != reader]
        if key.startswith(starts) and others:
            return "rounding", f"the {reader} engine alone reads it, and {others[0]} is on one side"
    if key == "XLA_FLAGS":
        left, right = (_flags(setup) for setup in (a, b))
        apart = left ^ right
        if apart and all(flag.startswith("--xla_force_host_platform_device_count") for flag in apart):
            return "rounding", "how many devices a CPU is cut into"
    return "number", "precision and algorithms of the framework's operations"


def _flags(setup: Setup) -> set[str]:
    fact = setup.get("variables", "XLA_FLAGS")
    return set() if fact is None else set(str(fact.value).split())


def _note(words: str) -> Any:
    return lambda key, a, b: ("rounding", words)


def _whatever(key: str, a: Setup, b: Setup) -> tuple[Effect, str]:
    return "number", "what is computed"


_EFFECTS = {
    "recipe": _recipe,
    "settings": _settings,
    "precision": _precision,
    "variables": _variables,
    "weights": lambda key, a, b: ("number", "everything: the numbers start from other weights"),
    "data": lambda key, a, b: ("number", "the rows, or their order"),
    "tokenizer": lambda key, a, b: ("number", "the tokens of every row"),
    "packages": _note("last digits, or a changed default: read its change log where nothing else differs"),
    "hardware": _note("order of sums and kernels"),
    "apart": lambda key, a, b: ("nothing", "nothing that is computed"),
}


@functools.cache
def _dropouts() -> frozenset[str]:
    """Fields that hold a dropout rate, in any supported family or in transformers' other ones."""
    ours = {name for one in supported_families() for name in family(one).dropouts}
    return frozenset(ours | {"attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop"})


def dropouts() -> Sequence[str]:
    """Names of config fields that are dropout rates."""
    return sorted(_dropouts())


def _words(key: str) -> str:
    """The first sentence of a recipe setting's own documentation."""
    cls: Any = Recipe
    words = ""
    for part in key.split("."):
        if not hasattr(cls, "__dataclass_fields__") or part not in hints(cls):
            break
        words = field_docs().get((cls.__name__, part), words)
        cls, _ = without_none(hints(cls)[part])
    return words.partition(". ")[0].rstrip(".")
