"""LoRA on both engines: log-probabilities and gradients against the merged model in float64, and against PEFT.

The merged model is transformers' own with W + alpha / rank B A as weights; the gradients of A and B follow from its
gradient of W by the chain rule, whatever the layout of W (fused, interleaved, Conv1D).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diptych import random
from diptych.engine import AdapterSpec, Head, Tensors
from diptych.families.adapter import SCORE, adapter_rules, adapter_shapes, merge
from diptych.families.family import read_model
from diptych.parity.tolerances import TOLERANCES
from parity_tests.families import CASES, hot_weights, loss_of, targets, train_batch
from parity_tests.family_checks import (
    ENGINES,
    build,
    gradient_error,
    output_error,
    outputs,
    outputs_and_gradients,
    quick_compilation,
)
from parity_tests.plain_models import PlainTransformers, plain_model
from parity_tests.test_families_canaries import short_batch

SPECS = {
    "llama": AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "mlp.down_proj")),
    "phi3": AdapterSpec(rank=2, alpha=3.0, targets=("qkv_proj", "o_proj")),
    "gpt2": AdapterSpec(rank=3, alpha=6.0, targets=("c_attn", "mlp.c_proj")),
    "gpt_neox": AdapterSpec(rank=2, alpha=1.0, targets=("all-linear",)),
}
FLOAT64 = TOLERANCES["model"].float64
GRADIENT = TOLERANCES["gradient_relative_l2"].float64


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def hot_adapter(case: str) -> Tensors:
    """A and B both away from 0, drawn by name."""
    shapes = adapter_shapes(read_model(CASES[case]), SPECS[case])
    return {
        name: random.normal(1, f"families/{name}", shape, std=0.2).astype(np.float64) for name, shape in shapes.items()
    }


def merged(case: str, head: Head) -> Tensors:
    return merge(read_model(CASES[case]), SPECS[case], hot_weights(CASES[case], head, "float64"), hot_adapter(case))


def adapted(engine: str, case: str, head: Head = "lm", *, alpha: float | None = None) -> Any:
    spec, held, adapter = SPECS[case], hot_weights(CASES[case], head, "float64"), hot_adapter(case)
    if alpha is not None:
        spec = AdapterSpec(rank=spec.rank, alpha=alpha, targets=spec.targets)
    return build(engine, CASES[case], held, head, adapter=spec, adapter_weights=adapter)


def by_chain_rule(case: str, gradients: Tensors) -> Tensors:
    """Gradients of A [rank, inputs] and B [outputs, rank] from those of the merged weights."""
    model, spec, adapter = read_model(CASES[case]), SPECS[case], hot_adapter(case)
    found: Tensors = {}
    for layer in range(model.num_layers):
        for one in adapter_rules(model, spec):
            name_a, name_b = one.names(layer)
            weight = gradients[one.rule.name.format(layer=layer)]
            weight = weight.T if one.transposed else weight
            found[name_a] = spec.scale * adapter[name_b].T @ weight
            found[name_b] = spec.scale * weight @ adapter[name_a].T
    return found


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_is_the_merged_model_and_without_it_the_base(engine, case, judge):
    batch = short_batch()
    expected, whole = outputs_and_gradients(plain_model(CASES[case], merged(case, "lm"), "lm"), batch)
    base, _ = outputs_and_gradients(plain_model(CASES[case], hot_weights(CASES[case], "lm", "float64"), "lm"), batch)
    model = adapted(engine, case)
    judge(case, "adapter", output_error(outputs(model, batch), expected, targets(batch)), FLOAT64)
    below = model.logprobs(batch, temperature=1.0, adapter=False)
    judge(case, "adapter", output_error(below, base, targets(batch)), FLOAT64)
    assert output_error(expected, base, targets(batch)) > 1e-2  # canary: an adapter that is left out shows
    found = model.gradients(loss_of("lm"), train_batch(batch, "lm"))
    error = gradient_error(found, by_chain_rule(case, whole))
    judge(case, "adapter gradients", error, GRADIENT)
    held = model.adapter_weights()
    assert held.keys() == hot_adapter(case).keys()
    assert all(np.array_equal(held[name], value) for name, value in hot_adapter(case).items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scalar_head_is_trained_beside_an_adapter(engine, judge):
    batch = short_batch()
    expected, whole = outputs_and_gradients(plain_model(CASES["llama"], merged("llama", "scalar"), "scalar"), batch)
    model = adapted(engine, "llama", "scalar")
    judge("llama", "adapter", output_error(model.scores(batch), expected, batch.attention), FLOAT64)
    found = model.gradients(loss_of("scalar"), train_batch(batch, "scalar"))
    wanted = by_chain_rule("llama", whole) | {SCORE: whole["score.weight"]}
    judge("llama", "adapter gradients", gradient_error(found, wanted), GRADIENT)


@pytest.mark.parametrize("engine", ENGINES)
def test_canary_alpha_and_exchanged_layers_are_seen(engine):
    batch = short_batch()
    expected, whole = outputs_and_gradients(plain_model(CASES["llama"], merged("llama", "lm"), "lm"), batch)
    wrong = adapted(engine, "llama", alpha=6.1)
    assert output_error(outputs(wrong, batch), expected, targets(batch)) > TOLERANCES["model"].float32
    right = by_chain_rule("llama", whole)
    a, b = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))
    assert gradient_error(right | {a: right[b], b: right[a]}, right) > TOLERANCES["gradient_relative_l2"].float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_chain_rule_is_pefts_adapter(case, judge):
    """The oracle of the tests above against PEFT's layers in the plain model, outputs and gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    batch, spec, adapter = short_batch(), SPECS[case], hot_adapter(case)
    plain = plain_model(CASES[case], hot_weights(CASES[case], "lm", "float64"), "lm")
    assert isinstance(plain, PlainTransformers)
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapter})
    modules = sorted({"mlp.c_proj" if name == "c_proj" else name for name in modules})
    lora = peft.LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=modules, lora_dropout=0.0, fan_in_fan_out=case == "gpt2"
    )
    wrapped = peft.get_peft_model(plain.model, lora, autocast_adapter_dtype=False)
    parameters = {name.replace(".default", ""): value for name, value in wrapped.named_parameters() if "lora_" in name}
    assert parameters.keys() == adapter.keys()
    for name, value in parameters.items():
        value.data = torch.tensor(adapter[name])
    wrapped.eval()
    plain.gradients = lambda: {name: value.grad.numpy() for name, value in parameters.items()}  # pyright: ignore
    found, gradients = outputs_and_gradients(plain, batch)
    expected, whole = outputs_and_gradients(plain_model(CASES[case], merged(case, "lm"), "lm"), batch)
    judge(case, "adapter", output_error(found, expected, targets(batch)), FLOAT64)
    judge(case, "adapter gradients", gradient_error(gradients, by_chain_rule(case, whole)), GRADIENT)
