"""Named workloads: a model's shape, the tokens of an iteration, and how it is trained. They are the whole of the work.

A workload is one PPO iteration on random weights and random prompts: rollout, scores of policy, reference, critic and
reward model, and one update of policy and critic (`epochs` times `mini_batches` of them). All four models have the same
shape. With `forced` lengths every answer has exactly `answer` tokens, so that every engine and every peer does the same
work; free ones end where the sampler draws the end-of-sequence token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diptych.engine import Precision, Remat
from diptych.errors import UserError

Architecture = Literal["llama", "qwen2", "opt", "rnn"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One iteration's work.

    layers, width, vocabulary, heads, kv_heads, ffn: of each of the four models; kv_heads, ffn None: `heads`, and what
    TRL's and Tunix's baselines take (8/3 width rounded up to 64; OPT 4 width). batch: rows of an iteration. prompt,
    answer: tokens of each row. micro_batch: rows of a forward and backward pass; None: a mini-batch. ragged: prompts of
    half to whole length. zero: DeepSpeed's stage.
    """

    name: str
    architecture: Architecture = "llama"
    layers: int
    width: int
    vocabulary: int
    heads: int = 4
    kv_heads: int | None = None
    ffn: int | None = None
    tied: bool = False
    batch: int
    prompt: int
    answer: int
    forced: bool = True
    ragged: bool = False
    epochs: int = 1
    mini_batches: int = 1
    micro_batch: int | None = None
    precision: Precision = "float32"
    remat: Remat = "none"
    zero: int = 0
    seed: int = 0

    @property
    def mlp(self) -> int:
        """Width of the feed-forward layer."""
        if self.ffn is not None:
            return self.ffn
        if self.architecture == "opt":
            return 4 * self.width
        return -(-int(self.width * 8 / 3) // 64) * 64

    @property
    def rows_at_once(self) -> int:
        return self.micro_batch or self.batch // self.mini_batches

    @property
    def trainer_scores(self) -> bool:
        """Has the policy a scoring pass beside the sampler's log-probabilities in every iteration?"""
        return self.precision == "bfloat16"

    def describe(self) -> str:
        """The work in one line."""
        shape = f"{self.layers} layers, d {self.width}, vocabulary {self.vocabulary}"
        lengths = f"{self.prompt}+{self.answer} tokens{'' if self.forced else ' at most'}"
        return f"{self.architecture}, {shape}, {self.batch} rows of {lengths}, {self.precision}"

    def config(self) -> dict[str, Any]:
        """The config.json of the policy, without the special tokens."""
        positions = self.prompt + self.answer + 8
        common = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": positions,
            "init_std" if self.architecture == "opt" else "initializer_range": 0.02,
            "tie_word_embeddings": self.tied,
        }
        if self.architecture == "rnn":
            return {"architectures": ["ElmanForCausalLM"], "model_type": "rnn", "nonlinearity": "tanh", **common}
        common["num_attention_heads"] = self.heads
        if self.architecture == "opt":
            return common | {
                "model_type": "opt",
                "ffn_dim": self.mlp,
                "word_embed_proj_dim": self.width,
                "do_layer_norm_before": True,
                "activation_function": "relu",
            }
        return common | {
            "model_type": self.architecture,
            "intermediate_size": self.mlp,
            "num_key_value_heads": self.kv_heads or self.heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
        }


def _cpu(name: str, layers: int, width: int, vocabulary: int, batch: int, length: int, **more: Any) -> Workload:
    return Workload(
        name=name, layers=layers, width=width, vocabulary=vocabulary, batch=batch, prompt=length, answer=length,
        heads=more.pop("heads", 4), **more,
    )  # fmt: skip


WORKLOADS: Mapping[str, Workload] = {
    one.name: one
    for one in (
        _cpu("tiny", 2, 128, 512, 16, 32),
        _cpu("small", 4, 256, 8192, 16, 64),
        _cpu("medium", 6, 512, 8192, 8, 64, heads=8),
        _cpu("opt-125m", 12, 768, 50272, 4, 128, architecture="opt", heads=12, tied=True),
        _cpu("rnn", 2, 256, 2048, 16, 64, architecture="rnn"),
        Workload(
            name="opt-1.3b", architecture="opt", layers=24, width=2048, vocabulary=50272, heads=32, tied=True,
            batch=64, prompt=256, answer=256, micro_batch=16, precision="bfloat16", remat="full", zero=1,
        ),
        Workload(
            name="llama-3.2-1b", layers=16, width=2048, vocabulary=128256, heads=32, kv_heads=8, ffn=8192, tied=True,
            batch=64, prompt=512, answer=512, micro_batch=8, precision="bfloat16", remat="full", zero=1,
        ),
    )
}  # fmt: skip
CPU_SET = ("tiny", "small", "medium", "opt-125m")
GPU_SET = ("opt-1.3b", "llama-3.2-1b")


def workload(name: str, settings: Sequence[str] = ()) -> Workload:
    """A named workload with changes (`batch=32`, `answer=256`). UserError for a name, field or value that is none."""
    if name not in WORKLOADS:
        raise UserError(f"no workload {name!r}: there are {', '.join(WORKLOADS)}")
    base = WORKLOADS[name]
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Workload) if field.name != "name"}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in kinds:
            raise UserError(f"{setting}: a workload has no {key!r}; it has {', '.join(kinds)}")
        changes[key] = _value(kinds[key], text, setting)
    made = dataclasses.replace(base, **changes)
    if changes:
        made = dataclasses.replace(made, name=f"{name}[{','.join(settings)}]")
    _check(made)
    return made


def _value(kind: str, text: str, setting: str) -> Any:
    if "None" in kind and text in ("null", "none"):
        return None
    if kind.startswith("bool"):
        if text not in ("true", "false"):
            raise UserError(f"{setting}: true or false is wanted")
        return text == "true"
    if kind.startswith("int"):
        if not text.lstrip("-").isdigit():
            raise UserError(f"{setting}: a whole number is wanted")
        return int(text)
    choices = {
        "Architecture": ("llama", "qwen2", "opt", "rnn"),
        "Precision": ("float32", "float64", "bfloat16"),
        "Remat": ("full", "dots", "none"),
    }[kind]
    if text not in choices:
        raise UserError(f"{setting}: {', '.join(choices)} are the choices")
    return text


def _check(made: Workload) -> None:
    """UserError for a workload that cannot be run."""
    for name in ("layers", "width", "heads", "batch", "prompt", "answer", "epochs", "mini_batches"):
        if getattr(made, name) < 1:
            raise UserError(f"{made.name}: {name} must be 1 or more, got {getattr(made, name)}")
    if made.vocabulary < 16:
        raise UserError(f"{made.name}: vocabulary must be 16 or more, got {made.vocabulary}")
    if made.width % made.heads or made.heads % (made.kv_heads or made.heads):
        raise UserError(f"{made.name}: heads must divide width, and kv_heads heads")
    if made.batch % made.mini_batches or (made.batch // made.mini_batches) % made.rows_at_once:
        raise UserError(f"{made.name}: batch must divide into mini_batches, and these into micro_batch rows")
