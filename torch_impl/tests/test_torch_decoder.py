"""Captured decode steps, with stand-ins for CUDA graphs; packed linear layers."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import ModelSpec, PromptBatch, Sampling
from diptych_torch import decode, linear, sampling
from diptych_torch.capture import CannotCapture, CudaGraphs, Step
from diptych_torch.model import Network, build
from torch_impl.tests.plain import CASES, hot

CPU = torch.device("cpu")
SETTINGS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 21, "stop_token_ids": ()}
STOPS = (3, 7, 20, 33, 41)


def network(config: dict[str, Any], precision: str = "float64") -> Network:
    spec = ModelSpec(config=config, weights=hot(config), head="lm", optimizer=None, micro_batch_size=1)
    return build(spec, getattr(torch, precision), CPU)


def prompts(rows: int = 9, width: int = 6, vocab: int = 40) -> PromptBatch:
    rng = np.random.default_rng(0)
    attention = np.arange(width) >= rng.integers(0, width, rows)[:, None]
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0).astype(np.int32)
    tokens = rng.integers(0, vocab, (rows, width)).astype(np.int32)
    return PromptBatch(tokens=tokens, attention=attention, positions=positions)


def noise(rows: int = 9, new: int = 21) -> np.ndarray:
    return np.random.default_rng(1).random((rows, new), dtype=np.float32)


def rollout(decoder: decode.Decoder, rows: int = 9, **changes: Any) -> Any:
    how = Sampling(**{**SETTINGS, **changes})
    return decoder.generate(prompts(rows), how, noise(rows, how.max_new_tokens), pad_token_id=0)


class Tape:
    """Stands in for CUDA graphs: to replay is to do the step again. As they, it does the step twice before it records,
    and a replay is of use only while all tensors lie where they lay."""

    def __init__(self) -> None:
        self.replays = 0
        self.decoder: Any = None

    def __call__(self, step: Step) -> Step:
        step()
        step()
        recorded = self._addresses()

        def replay() -> None:
            assert self._addresses() == recorded
            self.replays += 1
            step()

        return replay

    def _addresses(self) -> list[int]:
        slots = self.decoder._slots
        # Names with an underscore: what a step makes for itself.
        held = [value for where in (slots, slots.cache) for name, value in vars(where).items() if name[0] != "_"]
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        tensors += [one for value in held if isinstance(value, list) for one in value]
        return [tensor.data_ptr() for tensor in tensors]


def taped(network: Network) -> tuple[decode.Decoder, Tape]:
    tape = Tape()
    tape.decoder = decode.Decoder(network, CPU, capture=tape)
    return tape.decoder, tape


def same(found: Any, expected: Any) -> None:
    for name in ("tokens", "mask", "finish"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("logprobs", "margins"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "rnn"])
@pytest.mark.parametrize("changes", [{}, {"stop_token_ids": STOPS}, {"stop_token_ids": STOPS, "decode_rows": 3},
                                     {"temperature": 0.0, "decode_rows": 4}], ids=str)  # fmt: skip
def test_captured_steps_draw_what_plain_ones_draw(name, changes, monkeypatch):
    monkeypatch.setattr(decode, "SHORT", 8)  # several prefixes
    model = network(CASES[name])
    plain, (decoder, tape) = decode.Decoder(model, CPU), taped(model)
    same(rollout(decoder, **changes), rollout(plain, **changes))
    assert tape.replays > 0
    assert 1 < decoder.captures <= 4
    assert f"{decoder.captures} steps captured" in decoder.describe()
    assert "not captured: on cpu" in plain.describe()


def test_captures_are_kept_while_they_are_valid():
    model = network(CASES["llama"])
    decoder, _ = taped(model)
    seen = []
    cases: list[dict[str, Any]] = [
        {}, {}, {"max_new_tokens": 11}, {"stop_token_ids": (5,)}, {"max_new_tokens": 30}, {"decode_rows": 2},
    ]  # fmt: skip
    for changes in cases:
        same(rollout(decoder, **changes), rollout(decode.Decoder(model, CPU), **changes))
        seen.append(decoder.captures)
    # Again for other stop tokens, for a longer cache, for other slots.
    assert seen == [1, 1, 1, 2, 3, 4]
    assert decoder.recaptures == 0
    decoder.free()
    rollout(decoder, decode_rows=2)
    assert (decoder.captures, decoder.recaptures) == (5, 0)


def test_weights_that_move_void_the_captures_and_weights_that_change_do_not():
    model = network(CASES["llama"])
    decoder, _ = taped(model)
    before = rollout(decoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.3
    changed = rollout(decoder)
    assert (decoder.captures, decoder.recaptures) == (1, 0)
    same(changed, rollout(decode.Decoder(model, CPU)))
    assert (changed.tokens != before.tokens).any()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach() * 1.1, requires_grad=False))
    same(rollout(decoder), rollout(decode.Decoder(model, CPU)))
    assert (decoder.captures, decoder.recaptures) == (2, 1)
    assert "moved before 1 rollouts" in decoder.describe()


def test_the_end_is_seen_soon():
    model = network(CASES["llama"])
    decoder, tape = taped(model)
    free = rollout(decode.Decoder(model, CPU))
    every = tuple(range(CASES["llama"]["vocab_size"]))
    assert rollout(decoder, stop_token_ids=every).mask.sum() == 9
    assert tape.replays == 0
    stops = tuple(set(free.tokens[:, 2].tolist()))
    longest = rollout(decoder, stop_token_ids=stops).mask.sum(axis=1).max()
    assert longest <= 3
    assert 0 < tape.replays <= decode.STRIDE


def test_canary_a_step_that_changes_a_row_at_rest_is_seen(monkeypatch):
    model = network(CASES["llama"])
    decoder, _ = taped(model)
    expected = rollout(decode.Decoder(model, CPU), decode_rows=3)
    advance = decode.Slots.advance

    def broken(self: Any, *how: Any) -> None:
        advance(self, *how)
        self.step += ~self.running

    monkeypatch.setattr(decode.Slots, "advance", broken)
    assert (rollout(decoder, decode_rows=3).tokens != expected.tokens).any()


class Waits(TorchDispatchMode):
    """Notes what would wait for an accelerator: values brought to the host, tensors made of the host's."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in self.OPERATIONS:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Notes what reads a tensor's memory past the operations."""

    METHODS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.seen = waits.seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.METHODS:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in CASES if "," not in name]
    + [("llama", changes) for changes in ({"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9})],
    ids=str,
)
def test_a_step_asks_the_device_nothing(name, changes, monkeypatch):
    """Of which an accelerator's step is made (`sampling._has_none` looks only on the CPU). Mixtures of experts do."""
    monkeypatch.setattr(sampling, "_has_none", lambda cases: False)
    model = network(CASES[name], "float32")
    waits = Waits()

    def capture(step: Step) -> Step:
        step()
        with waits, Lists(waits):
            step()
        return step

    decoder = decode.Decoder(model, CPU, capture=capture)
    if model.num_experts:
        assert "experts" in decoder.describe()
        monkeypatch.setattr(decode, "_obstacle", lambda network: None)
        decoder = decode.Decoder(model, CPU, capture=capture)
    done = rollout(decoder, **{"stop_token_ids": (5,), **changes})
    assert decoder.captures == 1
    assert bool(waits.seen) == bool(model.num_experts)  # the canary: these do wait
    assert len(np.unique(done.tokens)) > 5


def test_what_cannot_be_captured_runs_plain_and_says_why():
    model = network(CASES["llama"])

    def refuse(step: Step) -> Step:
        raise CannotCapture("compute (line 3 of layer.py) waits for the device")

    decoder = decode.Decoder(model, CPU, capture=refuse)
    same(rollout(decoder, decode_rows=3), rollout(decode.Decoder(model, CPU)))
    assert decoder.captures == 0
    assert "not captured: compute (line 3 of layer.py) waits" in decoder.describe()


class FakeCuda:
    """The calls that `CudaGraphs` makes, without a device: what is captured is done again at every replay."""

    def __init__(self, monkeypatch: Any):
        self.mode: Any = 0
        self.log: list[str] = []
        nothing = contextlib.nullcontext()
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        graph = SimpleNamespace(replay=lambda: self.log.append("replay"))
        for name, value in {
            "graph_pool_handle": lambda: "pool", "device": lambda device: nothing, "Stream": lambda: stream,
            "current_stream": lambda: stream, "stream": lambda stream: nothing, "CUDAGraph": lambda: graph,
            "graph": self._graph, "get_sync_debug_mode": lambda: self.mode, "set_sync_debug_mode": self._set,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def _graph(self, graph: Any, *, pool: str) -> Any:
        self.log.append(f"capture in {pool}")
        return contextlib.nullcontext()

    def _set(self, mode: int | str) -> None:
        self.mode = 2 if mode == "error" else mode


def test_a_graph_is_warmed_up_watched_and_recorded_and_keeps_what_it_reads(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)

    def step(held: Any = held) -> None:
        cuda.log.append(f"step, waits {'refused' if cuda.mode == 2 else 'allowed'}")

    replay = CudaGraphs(CPU)(step)
    del held, step
    gc.collect()
    assert alive() is not None
    replay()
    allowed, refused = "step, waits allowed", "step, waits refused"
    assert cuda.log == ["wait", allowed, refused, "wait", "capture in pool", allowed, "replay"]
    assert cuda.mode == 0
    del replay
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("message", ["called a synchronizing CUDA operation", "out of memory"])
def test_a_step_that_waits_cannot_be_captured_and_other_errors_are_its_own(monkeypatch, message):
    cuda = FakeCuda(monkeypatch)

    def compute() -> None:
        if cuda.mode == 2:
            raise RuntimeError(message)

    waits = "synchronizing" in message
    with pytest.raises(CannotCapture if waits else RuntimeError, match="in compute" if waits else message):
        CudaGraphs(CPU)(compute)
    assert cuda.mode == 0
    assert not any(line.startswith("capture") for line in cuda.log)


WIDE = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
WIDE_GPT2 = {
    "model_type": "gpt2", "vocab_size": 260, "n_embd": 256, "n_layer": 1, "n_head": 4, "n_positions": 64,
}  # fmt: skip


@pytest.mark.parametrize(("config", "count"), [(WIDE, "11 of 15"), (WIDE_GPT2, "5 of 5")])
def test_packed_layers_multiply_as_before(config, count, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(decode, "obstacle", lambda *_: "for this test")
    model = network(config, "float32")
    decoder = decode.Decoder(model, CPU)
    with_packed = rollout(decoder)
    assert f"{count} linear layers in oneDNN" in decoder.describe()
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(linear, "SMALLEST_PACKED", 2**30)
    plain = rollout(decoder)
    assert "0 of" in decoder.describe()
    np.testing.assert_array_equal(with_packed.tokens, plain.tokens)
    np.testing.assert_allclose(with_packed.logprobs, plain.logprobs, rtol=0, atol=2e-5)
    assert (with_packed.logprobs != plain.logprobs).any()  # another kernel was at work


def test_new_weights_are_packed_anew_and_layers_are_put_back_after_an_error(monkeypatch):
    monkeypatch.setattr(decode, "obstacle", lambda *_: "for this test")
    model = network(WIDE, "float32")
    decoder = decode.Decoder(model, CPU)
    before = rollout(decoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    assert (rollout(decoder).tokens != before.tokens).any()
    monkeypatch.setattr(decode.Slots, "admit", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout(decoder)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_are_not_packed_in_other_precisions_or_beyond_the_limit(monkeypatch):
    decoder = decode.Decoder(network(WIDE, "float64"), CPU)
    rollout(decoder)
    assert "(torch.float64 on cpu): torch.float64 on cpu" in decoder.describe()
    monkeypatch.setattr(decode, "obstacle", lambda *_: "for this test")
    monkeypatch.setattr(linear, "LIMIT", 2**20)
    decoder = decode.Decoder(network(WIDE, "float32"), CPU)
    rollout(decoder)
    assert "3 of 15 linear layers in oneDNN" in decoder.describe()
