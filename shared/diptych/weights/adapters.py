"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

What is written here loads in `peft.PeftModel.from_pretrained`; what PEFT saved as plain LoRA is read here. A setting of
PEFT's that would change the numbers and that is not computed here is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diptych.engine import AdapterSpec, Head, Precision, Tensors
from diptych.errors import UserError
from diptych.families.adapter import SCORE, adapter_rules, check_adapter
from diptych.families.family import ModelConfig

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# Settings of PEFT's LoRA that change what is computed, and the values under which they do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False, None), "use_dora": (False, None),
    "use_qalora": (False, None), "use_bdlora": (False, None), "lora_bias": (False, None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layers_to_transform": (None, []), "layers_pattern": (None, []),
    "layer_replication": (None,), "target_parameters": (None, []), "trainable_token_indices": (None,),
    "exclude_modules": (None, []), "alora_invocation_tokens": (None,), "arrow_config": (None,), "eva_config": (None,),
    "corda_config": (None,), "megatron_config": (None,),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter on the host. weights: A and B, and a scalar head trained beside them, by PEFT's names."""

    spec: AdapterSpec
    weights: Tensors = field(repr=False)


def write_adapter(
    directory: Path, adapter: Adapter, model: ModelConfig, head: Head, *, base: str, tokenizer_directory: Path
) -> None:
    """Write an adapter's directory beside `directory` and move it into place. base: the model below it, for loaders."""
    _check(adapter.weights, model, adapter.spec, head, where=str(directory))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rules = adapter_rules(model, adapter.spec)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": adapter.spec.rank,
        "lora_alpha": adapter.spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({one.module for one in rules}),
        "modules_to_save": ["score"] if head == "scalar" else None,
        "fan_in_fan_out": any(one.transposed for one in rules),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: np.ascontiguousarray(value) for name, value in adapter.weights.items()}
    save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, partial / name)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def read_adapter(directory: Path, model: ModelConfig, head: Head, *, precision: Precision) -> Adapter:
    """Read an adapter for `model`; tensors are cast to `precision`.

    Raises UserError for a missing or broken file, a setting that is not computed, or tensors that are not this model's.
    """
    spec = read_adapter_spec(directory)
    try:
        tensors = {name: value.astype(precision) for name, value in load_file(directory / TENSORS).items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{directory / TENSORS}: not a readable safetensors file: {error}") from None
    _check(tensors, model, spec, head, where=str(directory))
    return Adapter(spec=spec, weights=tensors)


def read_adapter_spec(directory: Path) -> AdapterSpec:
    """Rank, alpha and targets of an adapter; its tensors are not read.

    Raises UserError for a missing or broken file, and for a setting that is not computed.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: not an adapter (no {CONFIG})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise UserError(f"{path}: {name} = {config[name]!r} is not supported (only {plain[0]!r})")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(f"{path}: target_modules = {targets!r}: a pattern; only a list of module names is read")
    saved = config.get("modules_to_save") or []
    if saved not in ([], ["score"]):
        raise UserError(f"{path}: modules_to_save = {saved}: only a scalar head, ['score'], is read")
    return AdapterSpec(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=(targets,) if isinstance(targets, str) else tuple(targets or ()),
    )


def _check(tensors: Tensors, model: ModelConfig, spec: AdapterSpec, head: Head, *, where: str) -> None:
    parts = dict(tensors)
    if (parts.pop(SCORE, None) is None) != (head == "lm"):
        raise UserError(f"{where}: {SCORE} is {'left over' if head == 'lm' else 'missing'}")
    check_adapter(parts, model, spec, where=where)
