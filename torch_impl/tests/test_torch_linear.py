"""Linear layers through oneDNN against torch's own: products, gradients, and whole models that train with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diptych.engine import AdapterSpec, EngineSettings, Loss, ModelSpec, OptimizerSpec, TrainBatch, load_engine
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model
from diptych.layout import Layout, Zero
from diptych_torch import linear
from torch_impl.tests.plain import CASES, hot

pytestmark = pytest.mark.skipif(not linear.HAS_ONEDNN, reason="this build of torch has no oneDNN")
SHAPES = [((70, 33), 20), ((2, 9, 16), 130), ((5, 1), 3), ((40, 24), 1), ((3, 0, 8), 4)]


def products(multiply: Any, x: Any, weight: Any, bias: Any, gradient: Any) -> list[torch.Tensor]:
    """The product, and the gradients of its operands."""
    inputs = [None if one is None else one.clone().requires_grad_() for one in (x, weight, bias)]
    y = multiply(*inputs)
    y.backward(gradient)
    return [y.detach(), *(one.grad for one in inputs if one is not None)]


def operands(shape: tuple[int, ...], outputs: int, is_transposed: bool, has_bias: bool) -> list[Any]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, shape[-1])
    weight = weight.t().contiguous() if is_transposed else weight
    return [torch.randn(shape), weight, torch.randn(outputs) if has_bias else None, torch.randn(*shape[:-1], outputs)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
def test_products_and_gradients_are_torchs(monkeypatch, shape, outputs, is_transposed, has_bias):
    given = operands(shape, outputs, is_transposed, has_bias)
    if given[0].numel():  # of nothing there is no product
        monkeypatch.setattr(linear, "SMALLEST", 0)
        monkeypatch.setattr(nn.functional, "linear", None)  # what is tested is not torch's
    found = products(lambda *inputs: linear.linear(*inputs, is_transposed=is_transposed), *given)
    monkeypatch.undo()
    wide = [None if one is None else one.double() for one in given]
    expected = products(
        lambda x, weight, bias: nn.functional.linear(x, weight.t() if is_transposed else weight, bias), *wide
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        torch.testing.assert_close(one, other.float(), rtol=2e-5, atol=2e-5)


def test_a_gradient_that_nobody_wants_is_not_made_nor_its_operand_kept(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    kept: list[Any] = []
    x, weight = torch.randn(8, 6), torch.randn(4, 6)
    for of_x, of_weight in ((True, False), (False, True)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
            inputs = x.clone().requires_grad_(of_x), weight.clone().requires_grad_(of_weight)
            linear.linear(*inputs).sum().backward()
        assert kept == [weight.shape if of_x else x.shape]
        assert [one.grad is not None for one in inputs] == [of_x, of_weight]


def test_the_same_product_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    given = operands((96, 64), 160, False, True)
    once, again = products(linear.linear, *given), products(linear.linear, *[one.clone() for one in given])
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_small_products_other_types_and_other_modules_stay_torchs(monkeypatch):
    monkeypatch.setattr(linear, "_multiply", None)
    torch.testing.assert_close(linear.linear(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))
    monkeypatch.setattr(linear, "SMALLEST", 0)
    for dtype in (torch.float64, torch.bfloat16):
        linear.linear(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype))
        model = nn.Sequential(nn.Linear(2, 2))
        linear.use_onednn(model, dtype, torch.device("cpu"))
        assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(2, 2), Conv1D(2, 2), nn.LayerNorm(2), nn.Bilinear(2, 2, 2))
    linear.use_onednn(model, torch.float32, torch.device("meta"))
    assert type(model[0]) is nn.Linear
    linear.use_onednn(model, torch.float32, torch.device("cpu"))
    assert [type(one).__name__ for one in model] == ["Linear", "TransposedLinear", "LayerNorm", "Bilinear"]
    assert type(model[0]) is linear.Linear


# -- models ------------------------------------------------------------------------------------------------------------

SPEC = AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "o_proj", "mlp.up_proj"))
ADAMW = OptimizerSpec(name="adamw", weight_decay=0.1, eps=1e-2, max_grad_norm=0.3)


def weighted(outputs: Any, *, weight: Any, total: float) -> Any:
    return (outputs * weight).sum() / total, {}


def trained(
    case: str, data: TrainBatch, *, head: Any = "lm", stage: int = 0, remat: Any = "none", adapter: Any = None
) -> dict[str, np.ndarray]:
    """What three updates leave of a model, and what it computes then."""
    config = CASES[case]
    rng = np.random.default_rng(3)
    shapes = {} if adapter is None else adapter_shapes(read_model(config), adapter)
    settings = EngineSettings(precision="float32", layout=Layout(zero=Zero(stage=stage)), remat=remat)
    model: Any = load_engine("torch", settings).model(
        ModelSpec(
            config=config, weights=hot(config, head), head=head, optimizer=ADAMW, micro_batch_size=2, logprob_chunk=8,
            adapter=adapter, adapter_weights={name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()},
        )
    )  # fmt: skip
    loss = Loss(function=weighted, reads="logprobs" if head == "lm" else "scores")
    gradients = model.gradients(loss, data)
    for _ in range(3):
        model.update(loss, data, learning_rate=1e-2)
    outputs = model.logprobs(data.tokens, temperature=1.0) if head == "lm" else model.scores(data.tokens)
    found = {f"gradient of {name}": value for name, value in gradients.items()} | {"outputs": outputs}
    return found | (model.weights() if adapter is None else model.adapter_weights())


@pytest.fixture
def data(make_batch) -> TrainBatch:
    batch = make_batch(rows=4, vocab=40)
    factors = np.random.default_rng(5).normal(size=batch.tokens.shape) * batch.attention
    return TrainBatch(tokens=batch, arrays={"weight": factors.astype(np.float32)}, denominators={"total": 30.0})


RUNS: dict[str, dict[str, Any]] = {
    "llama": {"case": "llama"},
    "llama, ZeRO 2": {"case": "llama", "stage": 2},
    "llama, ZeRO 3": {"case": "llama", "stage": 3},
    "llama, ZeRO 3, checkpointed": {"case": "llama", "stage": 3, "remat": "full"},
    "llama, checkpointed": {"case": "llama", "remat": "full"},
    "llama, products kept": {"case": "llama", "remat": "dots"},
    "llama, scores": {"case": "llama", "head": "scalar"},
    "llama, adapter": {"case": "llama", "adapter": SPEC},
    "llama, adapter, ZeRO 3": {"case": "llama", "adapter": SPEC, "stage": 3},
    "qwen3, tied": {"case": "qwen3"},
    "gpt2": {"case": "gpt2"},
    "gpt2, ZeRO 3": {"case": "gpt2", "stage": 3},
    "gpt2, adapter": {"case": "gpt2", "adapter": replace(SPEC, targets=("attn.c_proj", "mlp.c_fc"))},
    "mixtral": {"case": "mixtral"},
    "rnn": {"case": "rnn"},
}


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    assert one.keys() == other.keys()
    return {name: float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one}


@pytest.mark.parametrize("run", RUNS)
def test_models_train_and_compute_as_with_torchs_products(monkeypatch, data, run):
    expected = trained(data=data, **RUNS[run])
    calls, multiply = [], linear._multiply

    def counted(*inputs: Any) -> Any:
        calls.append(inputs[0].shape)
        return multiply(*inputs)

    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "_multiply", counted)
    found = trained(data=data, **RUNS[run])
    assert len(calls) > 100
    assert max(differences(found, expected).values()) < 2e-5


@pytest.mark.parametrize("operand", range(3))
def test_canary_a_wrong_gradient_is_seen(monkeypatch, data, operand):
    expected = trained(data=data, case="llama")
    backward = linear._Product.backward

    def wrong(ctx: Any, gradient: Any) -> Any:
        found = list(backward(ctx, gradient))
        found[operand] = None if found[operand] is None else 1.01 * found[operand]
        return tuple(found)

    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear._Product, "backward", staticmethod(wrong))
    assert max(differences(trained(data=data, case="llama"), expected).values()) > 1e-4
