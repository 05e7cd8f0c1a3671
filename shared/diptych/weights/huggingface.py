"""Hugging Face model directories, read and written: config.json, safetensors, tokenizer, generation config.

A directory is checked against the family's own list of tensors: a missing, left-over or misshapen tensor is an error.
What a stage writes loads in `AutoModelForCausalLM` or `AutoModelForSequenceClassification`, and in the other engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy, which safetensors then reads)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diptych import random
from diptych.engine import Head, Precision, Tensors
from diptych.errors import UserError
from diptych.weights.llama import LlamaConfig, parse_config, tensor_shapes

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on the host. config: the contents of config.json. weights: every tensor by Hugging Face name."""

    config: dict[str, Any]
    weights: Tensors = field(repr=False)
    head: Head

    @property
    def shape(self) -> LlamaConfig:
        return parse_config(self.config)


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of DIRECTORY/config.json. Raises UserError when it is not there or not JSON."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory (no config.json)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def read_checkpoint(directory: Path, *, precision: Precision) -> Checkpoint:
    """Read a model directory; weights are cast to `precision`.

    Raises UserError for a missing or broken file, an unsupported family, or tensors that are missing, left over or of
    another shape than config.json says.
    """
    head = check_checkpoint(directory)
    config = read_config(directory)
    tied = bool(config.get("tie_word_embeddings", False))
    weights: Tensors = {}
    for file in _tensor_files(directory):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not _is_derived(name):
                    weights[name] = tensors.get_tensor(name).astype(precision)
    head_copy = weights.pop("lm_head.weight", None) if tied else None
    if head_copy is not None and not np.array_equal(head_copy, weights["model.embed_tokens.weight"]):
        raise UserError(f"{directory}: lm_head.weight differs from the embeddings, yet tie_word_embeddings is true")
    return Checkpoint(config=config, weights=weights, head=head)


def check_checkpoint(directory: Path) -> Head:
    """Check a model directory's tensors against its config.json from the files' headers alone; returns its head."""
    shape = parse_config(read_config(directory), where=str(directory / "config.json"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _tensor_files(directory):
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if not _is_derived(name):
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    head: Head = "scalar" if "score.weight" in shapes else "lm"
    if shape.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)  # a copy of the embeddings that some tools write; compared when it is read
    _check_shapes(shapes, shape, head, where=str(directory))
    return head


def check_tensors(weights: Mapping[str, np.ndarray], config: LlamaConfig, head: Head, *, where: str) -> None:
    """Raise UserError unless `weights` holds exactly the model's tensors, each in its shape."""
    _check_shapes({name: value.shape for name, value in weights.items()}, config, head, where=where)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: LlamaConfig, head: Head, *, where: str) -> None:
    expected = tensor_shapes(config, head)
    missing = [name for name in expected if name not in shapes]
    left_over = [name for name in shapes if name not in expected]
    if missing or left_over:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"left over {_some(left_over)}"] * bool(left_over)
        raise UserError(f"{where}: tensors do not fit config.json: {'; '.join(parts)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{where}: {name} has shape {list(shapes[name])}, config.json says {list(shape)}")


def write_checkpoint(directory: Path, checkpoint: Checkpoint, *, tokenizer_directory: Path) -> None:
    """Write a complete model directory beside `directory` and move it into place, so that none is ever half-written.

    The tokenizer's files are copied byte for byte. Existing contents of `directory` are replaced.
    """
    check_tensors(checkpoint.weights, checkpoint.shape, checkpoint.head, where=str(directory))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in checkpoint.weights.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = _config_for_head(checkpoint)
    _write_json(partial / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    _write_json(partial / "generation_config.json", tokens)
    for name in TOKENIZER_FILES:
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, partial / name)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def initial_checkpoint(config: dict[str, Any], *, seed: int) -> Checkpoint:
    """A new language model: norms 1, every other tensor normal with std `initializer_range`, keyed by its name.

    Made once, in NumPy, so that both engines start from the same bits.
    """
    shape = parse_config(config)
    weights = {
        name: np.ones(dims, np.float32)
        if name.endswith("norm.weight")
        else random.normal(seed, f"init/{name}", dims, std=shape.initializer_range)
        for name, dims in tensor_shapes(shape, "lm").items()
    }
    return Checkpoint(config=config, weights=weights, head="lm")


def with_scalar_head(checkpoint: Checkpoint, *, seed: int, zero: bool = False) -> Checkpoint:
    """The same trunk with a new scalar head in place of its language-model head.

    The head is normal with std 1 / sqrt(hidden + 1) (Ziegler et al. 2019, reward model), or 0 where `zero` (their
    value head).
    """
    shape = checkpoint.shape
    weights = {
        name: value for name, value in checkpoint.weights.items() if name not in ("lm_head.weight", "score.weight")
    }
    std = 0.0 if zero else (shape.hidden_size + 1) ** -0.5
    head = random.normal(seed, "init/score.weight", (1, shape.hidden_size), std=std)
    weights["score.weight"] = head.astype(weights["model.norm.weight"].dtype)
    return replace(checkpoint, weights=weights, head="scalar")


def _config_for_head(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(checkpoint.weights["model.norm.weight"].dtype)
    if checkpoint.head == "scalar":
        config |= {
            "architectures": ["LlamaForSequenceClassification"],
            "num_labels": 1,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
        }
    else:
        config["architectures"] = ["LlamaForCausalLM"]
    return config


def _tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a single-file or sharded checkpoint."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        files = {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    elif single.is_file():
        files = {single}
    else:
        raise UserError(f"{directory}: no model.safetensors (other weight formats are not read: convert them first)")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: named in {index.name} but not there")
    return sorted(files)


def _is_derived(name: str) -> bool:
    """A table that old checkpoints carry and that config.json determines."""
    return name.endswith("rotary_emb.inv_freq")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
