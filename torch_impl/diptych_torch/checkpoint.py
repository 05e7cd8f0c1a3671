"""Training checkpoints: DeepSpeed's own format, and beside it what DeepSpeed does not know.

    DIRECTORY/diptych.json          what the checkpoint is of; written last, so that without it nothing is whole
    DIRECTORY/deepspeed/            DeepSpeed: trained weights, optimizer state, ZeRO partitions
    DIRECTORY/ema.safetensors       the averaged weights, where there are any

Going on from one is bit for bit the same as not having stopped. What an adapter leaves frozen is not in it: the model
that goes on is built on the same base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.errors import UserError

MANIFEST = "diptych.json"
TAG = "deepspeed"
EMA = "ema.safetensors"


def save(
    directory: Path, deepspeed_engine: Any, description: Mapping[str, Any], *, step: int, ema: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint into a new or empty folder. description: what `load` must find equal (JSON)."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UserError(f"{directory}: not empty; checkpoints are not written over")
    deepspeed_engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    if ema:
        save_file(dict(ema), directory / EMA)
    manifest = json.dumps({**description, "step": step}, indent=2)
    (directory / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


def load(directory: Path, deepspeed_engine: Any, description: Mapping[str, Any], *, ema: Mapping[str, Tensor]) -> int:
    """Read a checkpoint into the engine and into `ema`; returns the updates made before it was written.

    Raises UserError, before anything is changed, when there is none or it is of another model, optimizer, precision,
    ZeRO stage or number of processes.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory}: not a checkpoint of the torch engine (no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    _compare(directory, manifest, json.loads(json.dumps(description)))
    if ema:
        averages = load_file(directory / EMA)
        for name, value in ema.items():
            value.copy_(averages[name])
    # Below an adapter the frozen weights are missing; what is trained is all there (its shapes are compared above).
    is_whole = description["adapter"] is None
    loaded, _ = deepspeed_engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=is_whole)
    if loaded is None:
        raise UserError(f"{directory}: DeepSpeed cannot read its part of the checkpoint ({TAG}/)")
    return manifest["step"]


def _compare(directory: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        found = manifest.get(key)
        if key == "shapes" and isinstance(found, dict):
            for name in sorted(value.keys() | found.keys()):
                if value.get(name) != found.get(name):
                    shapes = f"shape {found.get(name)} in the checkpoint, {value.get(name)} in the model"
                    raise UserError(f"{directory}: {name} has {shapes}")
        elif found != value:
            raise UserError(f"{directory}: the checkpoint has {key} = {found!r}, this run has {value!r}")
