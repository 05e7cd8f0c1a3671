"""The device's side of a rollout: rows in slots, the queue's draws, and the step that all slots make together.

All tensors stay where they are from rollout to rollout while they are large enough, so that a captured step goes on
being valid.

Dimensions: B slots, G rows that are admitted together, Q rows of the queue, P prompt columns, S columns of the cache, N
new columns, D width of the states that the head reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.engine import PromptBatch, Sampling
from diptych.families.decoder import DecoderConfig
from diptych_torch.cache import Cache, StateCache
from diptych_torch.model import Network
from diptych_torch.sampling import draw


def new_cache(network: Network, *, rows: int, columns: int, device: torch.device) -> Cache | StateCache:
    """An empty memory of a network for so many columns: keys and values, or a recurrent model's state."""
    config, how = network.config, {"dtype": network.dtype, "device": device}
    if isinstance(config, DecoderConfig):
        return Cache(config, rows=rows, columns=columns, **how)
    return StateCache(layers=config.num_layers, rows=rows, width=config.hidden_size, **how)


class Slots:
    """`slots` rows that are decoded at once. step: tokens drawn so far; last: the newest of them, not yet in the cache;
    column: where in the cache it goes; position: its position; place: where the next draw goes in the flat buffers of
    the queue; running: is the row not yet at its end?

    tokens, numbers: what each row of the queue has drawn, and log-probability and margin; token -1: nothing. Behind the
    queue there is one row more, where draws go that are nobody's.
    """

    def __init__(self, network: Network, *, slots: int, columns: int, queued: int, new: int, device: torch.device):
        self.network = network
        self.reader: Any = network  # what reads tokens: the network, or the program of it (`decode`)
        self.columns, self.queued, self.new = columns, queued, new
        self.device = device
        self.cache = new_cache(network, rows=slots, columns=columns, device=device)
        whole = {"dtype": torch.int64, "device": device}
        numbers = torch.zeros(5, slots, **whole)
        self.last, self.step, self.column, self.position, self.place = numbers.unbind(0)
        self._counts = numbers[1:]  # what grows by one with each token
        self.running = torch.zeros(slots, dtype=torch.bool, device=device)
        self.readable = torch.ones(slots, columns, dtype=torch.bool, device=device)
        self.limit = torch.zeros((), **whole)  # tokens of a row
        # Draws are made in at least float32.
        wide = {"dtype": torch.promote_types(network.dtype, torch.float32), "device": device}
        self.uniforms = torch.zeros(queued + 1, new, **wide)
        self.tokens = torch.zeros(queued + 1, new, **whole)
        self.numbers = torch.zeros(queued + 1, new, 2, **wide)

    def hold(self, *, slots: int, columns: int, queued: int, new: int) -> bool:
        """Is there room for a rollout of this size? The number of slots must be the same."""
        room = columns <= self.columns and queued <= self.queued and new <= self.new
        return room and slots == len(self.running)

    def begin(self, uniforms: Float[np.ndarray, "Q N"], new: int) -> None:
        """A new queue, of whose rows none is admitted yet; up to `new` tokens each."""
        rows = len(uniforms)
        self.uniforms[:rows, :new] = torch.tensor(uniforms, device=self.device)
        self.tokens.fill_(-1)
        self.numbers.zero_()
        self.limit.fill_(new)
        self.running.zero_()

    def admit(
        self,
        prompts: PromptBatch,
        rows: Int[np.ndarray, " G"],
        slots: Int[np.ndarray, " G"],
        sampling: Sampling,
        stops: Int[Tensor, " stops"],
        prefill: int | None,
    ) -> None:
        """Read these rows' prompts into these slots and draw their first tokens."""
        tokens, attention, positions = (
            torch.tensor(array[rows], device=self.device)
            for array in (prompts.tokens.astype(np.int64), prompts.attention, prompts.positions.astype(np.int64))
        )
        row, slot = (torch.tensor(array, device=self.device) for array in (rows, slots))
        width = tokens.shape[1]
        is_whole = len(rows) == len(self.running)
        if is_whole:  # no row is in the way: they are read into the cache itself
            cache = self.cache
            cache.clear()
        else:
            cache = new_cache(self.network, rows=len(rows), columns=width, device=self.device)
        hidden = tokens
        size = prefill or width
        for piece, where in zip(tokens.split(size, dim=1), positions.split(size, dim=1), strict=True):
            end = cache.start + piece.shape[1]
            hidden = self.reader.hidden_states(piece, where, attention[:, :end], cache)
            cache.settle()
        if not is_whole:
            self.cache.admit(slot, cache)
        self.readable[slot] = True
        self.readable[slot, :width] = attention
        everyone = torch.ones_like(attention[:, 0])
        place = row * self.new
        token, goes_on = self._draw(hidden[:, -1], place, torch.zeros_like(row), everyone, sampling, stops)
        self.last[slot], self.running[slot], self.place[slot] = token, goes_on, place + 1
        self.step[slot], self.column[slot], self.position[slot] = 1, width, positions[:, -1] + 1

    def advance(self, sampling: Sampling, stops: Int[Tensor, " stops"], reach: int) -> None:
        """One step: the last tokens go in, the next are drawn. reach: columns of the cache that are read; no row that
        runs is beyond. A row that does not run stays as it is, whatever it computes."""
        running = self.running
        self.cache.step_to(self.column, reach)
        hidden = self.reader.hidden_states(
            self.last[:, None], self.position[:, None], self.readable[:, :reach], self.cache
        )
        self.cache.settle(running)
        token, goes_on = self._draw(hidden[:, -1], self.place, self.step, running, sampling, stops)
        self.last.copy_(token.where(running, self.last))
        self._counts += running
        running.copy_(goes_on)

    def _draw(
        self,
        hidden: Float[Tensor, "G D"],
        place: Int[Tensor, " G"],
        step: Int[Tensor, " G"],
        running: Bool[Tensor, " G"],
        sampling: Sampling,
        stops: Int[Tensor, " stops"],
    ) -> tuple[Int[Tensor, " G"], Bool[Tensor, " G"]]:
        """Draw token `step` of each row and write it down, at its place in the flat buffers, where the row runs.
        Returns the tokens, and which rows run on: a stop token belongs to the response, and the row is at its end after
        it."""
        uniforms = self.uniforms.view(-1)[place]  # behind a row at its end is the next row's, or nobody's
        drawn = draw(self.reader.logits(hidden), uniforms, sampling)
        place = place.where(running, self.queued * self.new)
        self.tokens.view(-1).index_copy_(0, place, drawn.token)
        self.numbers.view(-1, 2).index_copy_(0, place, torch.stack((drawn.logprob, drawn.margin), dim=1))
        goes_on = running & (step < self.limit - 1)
        if len(stops):
            goes_on &= (drawn.token[:, None] != stops).all(dim=1)
        return drawn.token, goes_on

    def look(self) -> tuple[Bool[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Which slots run, and how many tokens their rows have drawn. Waits for the device."""
        running, step = self.running.cpu().numpy(), self.step.cpu().numpy()
        return running.copy(), step.copy()  # on the CPU they are the tensors themselves

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no row runs: a step changes nothing that is read later."""
        running = self.running.clone()
        self.running.zero_()
        try:
            yield
        finally:
            self.running.copy_(running)
