"""Low-rank adapters: PEFT's layers around the module's linear ones, and their tensors by PEFT's names.

PEFT does the arithmetic, y = base(x) + alpha / rank B(A(x)); which modules it wraps is the hinge's choice. What is
trained stays beside the base in training and scoring; decoding reads a merged copy of the adapted weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import AdapterSpec
from diptych.errors import UserError
from diptych.families.adapter import PREFIX, adapter_rules
from diptych.families.family import ModelConfig

_NAME = "default"  # PEFT's name of the one adapter


def inject(transformer: Any, model: ModelConfig, spec: AdapterSpec) -> None:
    """Wrap the linear layers that `spec` names, in place; A and B have no storage yet (`meta`).

    Raises UserError where PEFT is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise UserError("adapters need peft, which is not installed: pip install 'diptych[torch]'") from None
    rules = adapter_rules(model, spec)
    layers = range(model.num_layers)
    modules = {one.rule.name.format(layer=layer).removesuffix(".weight") for layer in layers for one in rules}
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType] (a float where PEFT writes int: it only divides)
        lora_dropout=0.0,
        target_modules=sorted(modules),
        bias="none",
        fan_in_fan_out=any(one.transposed for one in rules),
        use_rslora=False,
        use_dora=False,
    )
    peft.inject_adapter_in_model(config, transformer, adapter_name=_NAME, low_cpu_mem_usage=True)
    wrapped = {name for name, module in transformer.named_modules() if _is_adapted(module)}
    assert wrapped == modules, f"PEFT wraps other modules than the adapter names: {sorted(wrapped ^ modules)}"


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def plain_name(name: str) -> str:
    """A base parameter's name without PEFT's wrapping."""
    return name.replace(".base_layer.", ".")


def peft_name(name: str) -> str | None:
    """PEFT's name of A or B; None of other parameters."""
    return PREFIX + name.replace(f".{_NAME}.", ".") if ".lora_" in name else None


def put(transformer: Any, name: str, parameter: nn.Parameter) -> None:
    """Use this parameter: a base one by its plain name, A or B by PEFT's."""
    path, _, last = name.removeprefix(PREFIX).rpartition(".")
    module = transformer.get_submodule(path)
    if ".lora_" in name:
        module = module[_NAME]
    elif _is_adapted(module):
        module = module.base_layer
    setattr(module, last, parameter)


@contextlib.contextmanager
def disabled(transformer: Any) -> Iterator[None]:
    """Inside, the model is what it is below its adapter."""
    layers = [module for module in transformer.modules() if _is_adapted(module)]
    needed = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_needed in needed.items():  # PEFT sets A and B to be trained, here or not
            parameter.requires_grad_(is_needed)


def merger(model: ModelConfig, spec: AdapterSpec, adapter: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> W + alpha / rank B A as a new tensor for an adapted weight, by its plain name; any other as it
    is."""
    adapted = {
        one.rule.name.format(layer=layer): (*one.names(layer), one.transposed)
        for layer in range(model.num_layers)
        for one in adapter_rules(model, spec)
    }

    def merged(name: str, weight: Tensor) -> Tensor:
        if name not in adapted:
            return weight
        a, b, is_transposed = adapted[name]
        # Upcast: the sum, which is rounded once.
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (adapter[b].to(wide) @ adapter[a].to(wide)) * spec.scale
        return (weight + (delta.T if is_transposed else delta)).to(weight.dtype)

    return merged
