"""The hybrid engine: one model that DeepSpeed trains and that generates, taking turns.

`native` generates from a decode copy (`switch`) by our own decoding (`decode`), each process its rows, or a group of
processes the same rows with the layers split among them (`tensor_parallel`). `deepspeed` generates by DeepSpeed's own
hybrid engine (`deepspeed_rollout`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.engine import (
    AdapterSpec,
    Completions,
    EngineSettings,
    Metrics,
    ModelSpec,
    PromptBatch,
    Sampling,
    TokenBatch,
)
from diptych.errors import InvariantError
from diptych.families.decoder import DecoderConfig
from diptych.parity.tolerances import TOLERANCES
from diptych.plan.footprint import prefill_columns
from diptych_torch import decode, deepspeed_rollout, tensor_parallel, zero
from diptych_torch.data_parallel import gather_completions, no_completions
from diptych_torch.model import Network, detached, device_batch
from diptych_torch.switch import switch
from diptych_torch.tensor_parallel import TensorGroup
from diptych_torch.zero import Shards

Score = Callable[[TokenBatch], Float[np.ndarray, "batch time"]]


class Hybrid:
    """Rollouts of one model. metrics: what the newest decode copy cost.

    deepspeed: the engine that trains, None for a frozen model; shards: the optimizer's pieces, likewise. The processes
    of `group` decode the same rows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        network: Network,
        trained: Mapping[str, nn.Parameter],
        *,
        deepspeed: Any,
        shards: Shards | None,
        group: TensorGroup,
        device: torch.device,
    ):
        self.metrics: Metrics = {}
        self._spec, self._settings, self._network, self._trained = spec, settings, network, trained
        self._deepspeed, self._shards, self._group, self._device = deepspeed, shards, group, device
        self._decoder: decode.Decoder | None = None
        self._copy: Network | None = None  # filled for the time of a rollout
        self._told = False  # that decoding takes a slower way than it might

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        uniforms: Float[np.ndarray, "batch new"],
        *,
        pad_token_id: int,
        score: Score,
    ) -> Completions:
        """`diptych.engine.Model.generate`; each group of processes its rows. Collective.

        score: the training forward's log-probabilities at temperature 1, for `layout.switch.check`."""
        group = self._group
        rows = np.arange(group.number, len(prompts), group.count)
        is_native = self._shards is None or self._settings.rollout != "deepspeed"
        if not is_native and not len(rows):
            rows = np.zeros(1, int)  # ZeRO-3 gathers with every process
        mine = PromptBatch(
            tokens=prompts.tokens[rows], attention=prompts.attention[rows], positions=prompts.positions[rows]
        )
        if is_native:
            done = no_completions(sampling.max_new_tokens, uniforms.dtype)
            if sampling.decode_rows is not None:
                sampling = replace(sampling, decode_rows=-(-sampling.decode_rows // group.count))
            with self._switched(prompts, score) as decoder:
                if len(rows):
                    width = prompts.tokens.shape[1]
                    prefill = prefill_columns(
                        rows=min(sampling.decode_rows or len(rows), len(rows)), width=width,
                        micro=-(-self._spec.micro_batch_size // zero.world_size()),
                        columns=width + sampling.max_new_tokens,
                    )  # fmt: skip
                    done = decoder.generate(mine, sampling, uniforms[rows], pad_token_id=pad_token_id, prefill=prefill)
        else:
            done = deepspeed_rollout.generate(
                self._deepspeed, self._network, mine, sampling, uniforms[rows], pad_token_id=pad_token_id,
                device=self._device,
            )  # fmt: skip
        return gather_completions(done, len(prompts), group.size)

    @contextmanager
    def _switched(self, prompts: PromptBatch, score: Score) -> Iterator[decode.Decoder]:
        """What generates natively, for as long as the rollout takes."""
        layout, config, group = self._settings.layout, self._network.config, self._group
        if self._decoder is None or self._copy is None:
            tensor_parallel.check(config, group.size)
            self._copy = empty_network(self._spec, self._network.dtype, self._device, None)
            if group.size > 1:
                tensor_parallel.split(self._copy, group)
            self._decoder = decode.Decoder(self._copy, self._device)
        part = None
        if isinstance(config, DecoderConfig) and group.size > 1:
            part = partial(tensor_parallel.cut, config=config, group=group)
        switched = switch(
            self._network.named_weights(), self._trained, shards=self._shards, config=config,
            adapter=self._spec.adapter, dtype=self._network.dtype, chunk=layout.switch_chunk, part=part,
        )  # fmt: skip
        self.metrics = {
            "timing_s/switch": switched.seconds,
            "switch/bytes_moved": float(switched.bytes_moved),
            "switch/bytes_per_second": switched.bytes_moved / switched.seconds,
        }
        with filled(self._copy, switched.weights, {}, requires_grad=False), zero.plain_linear():
            if layout.switch_check == "logprobs":
                self.metrics["switch/logprob_gap_max"] = self._gap(self._copy, prompts, score)
            yield self._decoder
        if self._device.type == "cuda" and not self._told and not self._decoder.captures:
            print(f"diptych: {self._decoder.describe()}", file=sys.stderr, flush=True)
            self._told = True
        self._decoder.free()  # its memory is the updates'

    @torch.no_grad()
    def _gap(self, copy: Network, prompts: PromptBatch, score: Score) -> float:
        """The largest difference between the prompts' log-probabilities under the two copies. InvariantError beyond the
        band of the precision."""
        rows = TokenBatch(tokens=prompts.tokens, attention=prompts.attention, positions=prompts.positions)
        size = self._spec.micro_batch_size
        pieces = [
            copy(device_batch(rows.take(slice(at, at + size)), self._network.config, self._device))[0]
            for at in range(0, len(rows), size)
        ]
        gap = float(np.abs(score(rows) - torch.cat(pieces).cpu().numpy()).max())
        limit = TOLERANCES["sampler_gap"].at(self._settings.precision)
        if not gap <= limit:
            raise InvariantError(
                f"the switch to the decode copy: log-probabilities of the prompts differ by up to {gap:.3g} (limit "
                f"{limit:.0e}) between the training weights and the copy"
            )
        return gap


def empty_network(spec: ModelSpec, dtype: torch.dtype, device: torch.device, adapter: AdapterSpec | None) -> Network:
    """A network without DeepSpeed's hooks, to be `filled`."""
    return Network(spec.config, spec.head, dtype, device, adapter).eval()


@contextmanager
def filled(
    network: Network, weights: Mapping[str, Tensor], trained: Mapping[str, Tensor], *, requires_grad: bool
) -> Iterator[Network]:
    """A network that uses these tensors, and forgets them afterwards."""
    empty, nothing = detached(network.named_weights()), detached(network.trained_weights())
    network.assign(weights, trained, requires_grad=requires_grad)
    try:
        yield network
    finally:
        network.assign(empty, nothing, requires_grad=False)
