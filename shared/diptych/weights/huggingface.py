"""Hugging Face model directories, read and written: config.json, safetensors, tokenizer, generation config, model card.

A directory is checked against the family's own list of tensors, from headers alone: a missing, left-over or misshapen
tensor is an error. Tensors are read when they are looked up and written one by one, so that the whole model need never
be in host memory. What is written loads in `AutoModelForCausalLM` or `AutoModelForSequenceClassification`, and in the
other engine.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych import random
from diptych.engine import Head, Precision
from diptych.errors import UserError
from diptych.families.family import ModelConfig, family, initial_value, read_model, tensor_rules, tensor_shapes
from diptych.weights.card import Provenance, model_card, read_provenance
from diptych.weights.contents import Contents, misfits, read_config, read_contents, tied_copy_differs
from diptych.weights.files import DTYPES, INDEX, SINGLE_FILE, file_order, plan_shards, write_tensors
from diptych.weights.tensors import LazyTensors, stream, tensor_dtypes_of, tensor_shapes_of
from diptych.world import SINGLE, World

__all__ = [
    "Checkpoint", "check_checkpoint", "check_tensors", "initial_checkpoint", "read_checkpoint", "read_config",
    "with_scalar_head", "write_checkpoint",
]  # fmt: skip

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on the host. config: the contents of config.json. weights: every tensor by Hugging Face name; what
    `read_checkpoint` gives is lazy (`LazyTensors`): a look-up reads the file."""

    config: dict[str, Any]
    weights: Mapping[str, np.ndarray] = field(repr=False)
    head: Head

    @property
    def model(self) -> ModelConfig:
        """What the model computes."""
        return read_model(self.config)


def read_checkpoint(directory: Path, *, precision: Precision) -> Checkpoint:
    """Open a model directory; a tensor is read, and cast to `precision`, when it is looked up.

    Raises UserError for a missing or broken file, an unsupported family, or tensors that are missing, left over or of
    another shape than config.json says, before any tensor is read.
    """
    contents = _checked(directory)
    difference = tied_copy_differs(contents)
    if difference is not None:
        raise UserError(f"{directory}: {difference}")
    tensors, wanted = contents.tensors, np.dtype(precision)
    # Written again they take the type they had in the file, or, where it was read at less, the type of the reading.
    dtypes = {name: t.dtype if t.dtype.itemsize <= wanted.itemsize else wanted for name, t in tensors.items()}
    weights = LazyTensors(
        {name: tensor.shape for name, tensor in tensors.items()}, dtypes, lambda name: tensors[name].read(wanted)
    )
    return Checkpoint(config=contents.config, weights=weights, head=contents.head)


def check_checkpoint(directory: Path) -> Head:
    """Check a model directory's tensors against its config.json from the files' headers alone; returns its head."""
    return _checked(directory).head


def _checked(directory: Path) -> Contents:
    contents = read_contents(directory)
    if contents.problems:
        raise UserError(f"{directory}: tensors do not fit config.json: {'; '.join(contents.problems)}")
    return contents


def check_tensors(weights: Mapping[str, np.ndarray], config: ModelConfig, head: Head, *, where: str) -> None:
    """Raise UserError unless `weights` holds exactly the model's tensors, each in its shape. Lazy ones are not read."""
    problems = misfits(tensor_shapes_of(weights), tensor_shapes(config, head))
    if problems:
        raise UserError(f"{where}: tensors do not fit config.json: {'; '.join(problems)}")


def write_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    tokenizer_directory: Path,
    dtype: Dtype = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    provenance: Provenance | None = None,
    world: World = SINGLE,
) -> None:
    """Write a complete model directory beside `directory` and move it into place, so that none is ever half-written.

    dtype: "auto" keeps every tensor's own: that of its array, or of its file where the checkpoint is as it was read.
    Rounding to less is therefore never done unless asked for. max_shard_bytes: tensors go into several files, with an
    index, where they take more than this (one larger tensor has a file of its own). tokenizer_directory: its tokenizer,
    chat template and licence files are copied byte for byte, and its generation_config.json is kept, with the token ids
    of config.json. provenance: for the model card; None: what the directories themselves tell. Existing contents of
    `directory` are replaced. world: the processes that the model lies on: all of them read its tensors (which may take
    all of them) and process 0 writes; its error is raised in all.
    """
    check_tensors(checkpoint.weights, checkpoint.model, checkpoint.head, where=str(directory))
    partial = directory.with_name(directory.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def complete() -> None:
        config = _config_for_head(checkpoint, dtypes)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", _generation_config(config, tokenizer_directory))
        for file in _copied_files(tokenizer_directory):
            shutil.copyfile(file, partial / file.name)
        known = provenance or read_provenance(directory, source=tokenizer_directory)
        card = model_card(directory.name, checkpoint.model, checkpoint.head, config["dtype"], known)
        (partial / "README.md").write_text(card, encoding="utf-8")

    def put_in_place() -> None:
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)

    world.first(begin)
    try:
        dtypes = _write_weights(partial, checkpoint, dtype, max_shard_bytes, world)
        world.first(complete)
    except BaseException:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    world.first(put_in_place, leaves=directory)


def initial_checkpoint(config: dict[str, Any], *, seed: int) -> Checkpoint:
    """A new language model, float32: norms 1, biases 0, all else normal with std `initializer_range`, keyed by name.

    Drawn in NumPy when looked up, the same every time, so that both engines start from the same bits.
    """
    model = read_model(config)
    shapes = tensor_shapes(model, "lm")
    rules = {
        name: rule for rule in tensor_rules(model, "lm") for i in rule.layers(model) for name in rule.names(model, i)
    }

    def draw(name: str) -> np.ndarray:
        constant = initial_value(model, rules[name])
        if constant is not None:
            return np.full(shapes[name], constant, np.float32)
        return random.normal(seed, f"init/{name}", shapes[name], std=model.initializer_range)

    weights = LazyTensors(shapes, dict.fromkeys(shapes, DTYPES["F32"]), draw)
    return Checkpoint(config=config, weights=weights, head="lm")


def with_scalar_head(checkpoint: Checkpoint, *, seed: int, zero: bool = False) -> Checkpoint:
    """The same trunk with a new scalar head in place of its language-model head.

    The head is normal with std 1 / sqrt(hidden + 1) (Ziegler et al. 2019, reward model), or 0 where `zero` (their
    value head). It has the precision of the trunk's tensors as they are looked up.
    """
    shapes = tensor_shapes(checkpoint.model, "scalar")
    dtypes = tensor_dtypes_of(checkpoint.weights)
    smallest = min((name for name in shapes if name in dtypes), key=lambda name: np.prod(shapes[name]))
    precision = checkpoint.weights[smallest].dtype
    std = 0.0 if zero else (shapes["score.weight"][1] + 1) ** -0.5
    head = random.normal(seed, "init/score.weight", shapes["score.weight"], std=std).astype(precision)
    weights = LazyTensors(
        shapes,
        {name: dtypes.get(name, precision) if name != "score.weight" else precision for name in shapes},
        lambda name: head.copy() if name == "score.weight" else checkpoint.weights[name],
    )
    return replace(checkpoint, weights=weights, head="scalar")


def _write_weights(
    directory: Path, checkpoint: Checkpoint, dtype: Dtype, limit: int, world: World
) -> dict[str, np.dtype]:
    """Write the tensors; returns the type that each was written in."""
    shapes = tensor_shapes(checkpoint.model, checkpoint.head)
    own = tensor_dtypes_of(checkpoint.weights)
    chosen = {kind.name: kind for kind in DTYPES.values()}
    dtypes = {name: own[name] if dtype == "auto" else chosen[dtype] for name in shapes}
    sizes = {name: int(np.prod(shape)) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, limit)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        entries = {name: (dtypes[name], shapes[name]) for name in names}
        _write_file(directory / file, entries, checkpoint.weights, world)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        world.first(lambda: _write_json(directory / INDEX, index))
    return dtypes


def _write_file(
    file: Path,
    entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    weights: Mapping[str, np.ndarray],
    world: World,
) -> None:
    """Every process reads the file's tensors, process 0 writes them. Where it cannot, it still reads the rest with the
    others, and its error is raised in all."""
    tensors = stream(weights, file_order(entries))
    failure: list[Exception] = []
    if world.is_main:
        try:
            write_tensors(file, entries, lambda _: tensors)
        except Exception as error:
            failure.append(error)
    if world.count > 1:
        for _ in tensors:
            pass

    def report() -> None:
        if failure:
            raise failure[0]

    world.first(report)


def _config_for_head(checkpoint: Checkpoint, dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    """config.json as transformers would write it for this head; `dtype` is that of the largest part of the numbers."""
    elements: Counter[str] = Counter()
    for name, shape in tensor_shapes(checkpoint.model, checkpoint.head).items():
        elements[dtypes[name].name] += int(np.prod(shape))
    config = dict(checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = elements.most_common(1)[0][0]
    entry = family(config["model_type"])
    if checkpoint.head == "scalar":
        config |= {
            "architectures": [entry.classifier],
            "num_labels": 1,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
        }
    else:
        config["architectures"] = [entry.causal_lm]
    return config


def _generation_config(config: Mapping[str, Any], tokenizer_directory: Path) -> dict[str, Any]:
    """The one that came with the tokenizer, with config.json's token ids. Further ids that end a text are kept."""
    path = tokenizer_directory / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    if isinstance(generation.get("eos_token_id"), list) and ids.get("eos_token_id") is not None:
        first = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
        ids["eos_token_id"] = list(dict.fromkeys([*first, *generation["eos_token_id"]]))
    return generation | ids


def _copied_files(directory: Path) -> list[Path]:
    """The tokenizer, the chat template, and the terms that the weights came with."""
    terms = sorted(file for pattern in ("LICENSE*", "NOTICE*") for file in directory.glob(pattern))
    return [file for file in [*(directory / name for name in TOKENIZER_FILES), *terms] if file.is_file()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
