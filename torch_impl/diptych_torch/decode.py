"""Rollouts: prefill the left-padded prompts, then one token a step for every row, until all have ended.

The trunk is the training forward's (`Network.hidden_states`); only the cache is new to it. Prompts wait in a queue and
are decoded in *slots*, as many rows as run at once. A row that has ended leaves its slot, and as soon as enough are
free the next prompts are prefilled together and take them. A slot's column, padding and uniforms are its row's own: no
row depends on its slot, its neighbours or the order.

One step (`Slots.advance`) is a fixed program on tensors that stay where they are: rows that have ended write nothing,
and the host is not asked. On CUDA it is captured into a graph, one for each of a few prefixes of the cache, and
replayed; the host looks every few steps which rows run. On the CPU, where looking is free, it runs as it is and reads
just the filled prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.engine import Completions, Finish, PromptBatch, Sampling
from diptych.families.family import ModelConfig, check_reach
from diptych_torch.capture import CannotCapture, Capture, CudaGraphs, Step
from diptych_torch.linear import packed_linears
from diptych_torch.model import Network, check_token_ids
from diptych_torch.program import Program, obstacle
from diptych_torch.slots import Slots

GROUP = 8  # a refill waits until so many-th a part of the slots can be filled
STRIDE = 8  # captured steps between two looks at which rows run
SHORT = 512  # columns of a cache whose parts are not worth a program of their own


def generate(
    network: Network,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    device: torch.device,
    prefill: int | None = None,
) -> Completions:
    """`Decoder.generate` of a decoder that is not kept."""
    return Decoder(network, device).generate(prompts, sampling, uniforms, pad_token_id=pad_token_id, prefill=prefill)


class Decoder:
    """Rollouts of one network, and what they keep between them: the slots with their cache, and captured steps.

    A step is captured again when the slots must be made anew, and when the network's weights lie elsewhere than before
    (their values may change at will). captures: how many there were; recaptures: how many rollouts found the weights
    moved and their captured steps void.
    """

    def __init__(self, network: Network, device: torch.device, *, capture: Capture | None = None):
        """capture: what records a step; None: CUDA graphs on CUDA, nothing elsewhere."""
        self.captures = self.recaptures = 0
        self._network = network
        self._device = device
        self._how = ""
        self._plain_because = _obstacle(network) if capture or device.type == "cuda" else f"on {device.type}"
        if self._plain_because is None and capture is None:
            capture = CudaGraphs(device)
        self._capture = capture if self._plain_because is None else None
        self.free()

    def free(self) -> None:
        """Let go of the cache and the captured steps; the next rollout makes them anew."""
        self._steps: dict[tuple[Sampling, int], Step] = {}
        self._slots: Slots | None = None
        self._addresses: tuple[int, ...] = ()

    def describe(self) -> str:
        """One line for the log: how steps run, and why so where there is a faster way."""
        how = f"{self.captures} steps captured" if self._capture else f"steps not captured: {self._plain_because}"
        again = f"; weights had moved before {self.recaptures} rollouts" if self.recaptures else ""
        return f"decode: {how}{again}" + (f"; {self._how}" if self._how else "")

    @torch.inference_mode()
    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        uniforms: Float[np.ndarray, "batch new"],
        *,
        pad_token_id: int,
        prefill: int | None = None,
    ) -> Completions:
        """Sample completions (`diptych.engine.Model.generate`), `sampling.decode_rows` rows at a time. The network is
        read, never written.

        prefill: prompt columns that go through the network at once; None: all. It changes nothing but memory. Raises
        ValueError for inputs that break the protocol, and UserError for text that outgrows the model's positions.
        """
        _check(prompts, sampling, uniforms, self._network.config)
        slots = self._slots_for(prompts, sampling)
        slots.begin(uniforms, sampling.max_new_tokens)
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self._device)
        width, taken = prompts.tokens.shape[1], 0
        with self._reader_of(slots):
            while True:
                running, step = slots.look()
                free, waiting = np.flatnonzero(~running), len(prompts) - taken
                if _is_enough(len(free), waiting, len(running)):
                    free = free[:waiting]
                    slots.admit(prompts, np.arange(taken, taken + len(free)), free, sampling, stops, prefill)
                    taken += len(free)
                elif running.any():
                    self._advance(slots, sampling, stops, width, step[running])
                else:
                    return _completions(slots, len(prompts), sampling, pad_token_id)

    @contextmanager
    def _reader_of(self, slots: Slots) -> Iterator[None]:
        """Inside, the slots' tokens are read by a program, or by the network's modules where that cannot be."""
        rows = len(slots.running)
        reason = obstacle(self._network, self._device)
        if reason is None:
            self._how = "by a program of products in oneDNN"
            slots.reader = Program(self._network, rows)
            try:
                yield
            finally:
                slots.reader = self._network
        else:
            with packed_linears(self._network, rows) as linears:
                self._how = f"by transformers' modules ({reason}): {linears}"
                yield

    def _slots_for(self, prompts: PromptBatch, sampling: Sampling) -> Slots:
        """The slots that are there, or where these are too small, new ones. Captured steps that are no longer valid are
        dropped."""
        weights = itertools.chain(self._network.parameters(), self._network.buffers())
        addresses = tuple(weight.data_ptr() for weight in weights)
        if addresses != self._addresses:
            self.recaptures += bool(self._steps)
            self._steps.clear()
            self._addresses = addresses
        queued, new = len(prompts), sampling.max_new_tokens
        size = {
            "slots": min(sampling.decode_rows or queued, queued),
            "columns": prompts.tokens.shape[1] + new,
            "queued": queued,
            "new": new,
        }
        if self._slots is None or not self._slots.hold(**size):
            self._steps.clear()
            self._slots = None  # its memory first
            self._slots = Slots(self._network, **size, device=self._device)
        return self._slots

    def _advance(
        self, slots: Slots, sampling: Sampling, stops: Tensor, width: int, step: Int[np.ndarray, " running"]
    ) -> None:
        """The next steps, until the host should look again. step: tokens that the rows that run have drawn."""
        reach = width + int(step.max())
        if self._capture is not None:
            num_steps = min(STRIDE, sampling.max_new_tokens - int(step.min()))
            furthest = min(reach + num_steps - 1, slots.columns)
            captured = self._captured(slots, sampling, stops, next(p for p in prefixes(slots.columns) if p >= furthest))
            if captured is not None:
                for _ in range(num_steps):
                    captured()
                return
        # A CPU reads what lies in one piece twice as fast as what lies in many.
        slots.advance(sampling, stops, slots.columns if 2 * reach > slots.columns else reach)

    def _captured(self, slots: Slots, sampling: Sampling, stops: Tensor, reach: int) -> Step | None:
        """The captured step that reads so many columns; None where it turns out that none can be captured."""
        key = replace(sampling, max_new_tokens=0, decode_rows=None), reach
        if key not in self._steps and self._capture is not None:
            try:
                with slots.at_rest():
                    self._steps[key] = self._capture(lambda: slots.advance(sampling, stops, reach))
                self.captures += 1
            except CannotCapture as reason:
                self._plain_because, self._capture = str(reason), None
        return self._steps.get(key)


def prefixes(columns: int) -> tuple[int, ...]:
    """How many columns of a cache a captured step may read: quarters of a long one, a short one whole."""
    parts = (1, 2, 3, 4) if columns >= SHORT else (4,)
    return tuple(-(-columns * part // 4) for part in parts)


def _is_enough(free: int, waiting: int, slots: int) -> bool:
    """Can three quarters of a group be admitted, or of all that still wait?"""
    return waiting > 0 and 4 * free >= 3 * min(waiting, max(1, slots // GROUP))


def _completions(slots: Slots, queued: int, sampling: Sampling, pad_token_id: int) -> Completions:
    """What the rows of the queue have drawn."""
    new = sampling.max_new_tokens
    tokens = slots.tokens[:queued, :new].to(torch.int32).cpu().numpy()
    numbers = slots.numbers[:queued, :new].cpu().numpy()
    mask = tokens >= 0
    last = np.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
    is_stop = np.isin(last, sampling.stop_token_ids)
    return Completions(
        tokens=np.where(mask, tokens, np.int32(pad_token_id)),
        mask=mask,
        logprobs=numbers[..., 0].copy(),
        margins=numbers[..., 1].copy(),
        finish=np.where(is_stop, Finish.STOP, Finish.LENGTH).astype(np.int32),
    )


def _obstacle(network: Network) -> str | None:
    """Why this network's steps cannot be captured, where that is known beforehand."""
    if network.is_split:
        return "several processes decode together"
    return "the host reads which experts were chosen" if network.num_experts else None


def _check(prompts: PromptBatch, sampling: Sampling, uniforms: np.ndarray, config: ModelConfig) -> None:
    check_token_ids(prompts.tokens, config.vocab_size)
    rows, width = prompts.tokens.shape
    if not (width and prompts.attention[:, -1].all() and (np.diff(prompts.attention.astype(np.int8)) >= 0).all()):
        raise ValueError("prompts must be left-padded and hold at least one token each")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if sampling.decode_rows is not None and sampling.decode_rows < 1:
        raise ValueError(f"decode_rows must be at least 1, got {sampling.decode_rows}")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"not a way to sample: {sampling}")
    if uniforms.shape != (rows, sampling.max_new_tokens):
        raise ValueError(f"uniforms must be [{rows}, {sampling.max_new_tokens}], got {list(uniforms.shape)}")
    check_reach(config, prompt=int(prompts.positions.max()) + 1, new=sampling.max_new_tokens)
