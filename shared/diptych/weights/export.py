"""`diptych export`: a model directory through an engine and out again, tensor by tensor.

With `dtype="auto"` the tensors that come out are, byte for byte, those that went in: float32 holds every bfloat16 and
float16, and the engine's precision is float64 where a tensor is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from diptych.engine import EngineSettings, Model, ModelSpec, Precision, load_engine
from diptych.errors import UserError
from diptych.families.family import tensor_shapes
from diptych.weights.contents import read_contents
from diptych.weights.huggingface import Checkpoint, Dtype, read_checkpoint, write_checkpoint
from diptych.weights.tensors import LazyTensors, tensor_dtypes_of

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(directory: Path, output: Path, *, engine: str, dtype: Dtype = "auto", max_shard_bytes: int) -> None:
    """Import DIRECTORY with `engine` and write what it holds to OUTPUT.

    Raises UserError where DIRECTORY does not load or OUTPUT is there already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name a new directory")
    checkpoint = read_checkpoint(directory, precision=lossless_precision(directory))
    settings = EngineSettings(precision=lossless_precision(directory))
    model = load_engine(engine, settings).model(
        ModelSpec(
            config=checkpoint.config, weights=checkpoint.weights, head=checkpoint.head, optimizer=None,
            micro_batch_size=1,
        )
    )  # fmt: skip
    write_checkpoint(
        output,
        checkpoint_of(model, like=checkpoint),
        tokenizer_directory=directory,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def lossless_precision(directory: Path) -> Precision:
    """The precision that holds every tensor of a model directory exactly."""
    wide = any(tensor.kind == "F64" for tensor in read_contents(directory).tensors.values())
    return "float64" if wide else "float32"


def checkpoint_of(model: Model, *, like: Checkpoint) -> Checkpoint:
    """The engine's model as a checkpoint: a tensor comes to the host when it is written, in `like`'s types."""
    shapes = tensor_shapes(like.model, like.head)
    dtypes = tensor_dtypes_of(like.weights)

    weights = LazyTensors(
        shapes, {name: dtypes[name] for name in shapes}, lambda name: model.weights(names=[name])[name]
    )
    return replace(like, weights=weights)


def parse_size(text: str) -> int:
    """Bytes: "5GB" (10^9), "500MB", "2GiB" (2^30), "1000000". Raises UserError for anything else or nothing."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"a size of {text!r}: write it as 5GB, 500MB, 2GiB or in bytes")
    return size
