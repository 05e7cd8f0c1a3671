"""The policy as a rollout server generates from it: weights sent where they have changed, answers shared by all."""

from __future__ import annotations

import math
import time
import uuid
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Float

from diptych.engine import MASTERS, Completions, Metrics, Model, Precision, PromptBatch, Sampling, Tensors
from diptych.errors import UserError
from diptych.families.adapter import merge
from diptych.families.family import read_model, tensor_shapes
from diptych.rewards.function import load_target
from diptych.rollout_server import Request, RolloutServer, ServerStart, read_answer
from diptych.weights.tensors import in_groups
from diptych.world import World

PIECE = 256 * 2**20  # bytes of weights that are brought to the host and sent at a time, where the recipe says nothing


class ServedPolicy:
    """Takes the place of the policy's own `generate`. A context manager, which closes the server.

    Process 0 talks to the server and the others take its answers; every method is collective. precision: what the
    server computes in.
    """

    precision: Precision

    def __init__(
        self,
        target: str,
        policy: Model,
        *,
        tokenizer_directory: Path,
        precision: Precision,
        world: World,
        piece: int | None = None,
    ) -> None:
        """piece: bytes of weights that are sent at a time; a larger tensor goes alone."""
        self.where = f"rollout server {target}"
        self._policy, self._world = policy, world
        self._model = read_model(policy.spec.config)
        self._dtype = np.float64 if precision == "float64" else np.float32
        itemsize = 8 if MASTERS[precision] == "float64" else 4
        sizes = {name: itemsize * math.prod(shape) for name, shape in tensor_shapes(self._model, "lm").items()}
        self._pieces = list(in_groups(sizes, piece or PIECE))
        self._server: RolloutServer | None = None
        # Of this process alone: what another run has left in the server has another version.
        self._mark = uuid.uuid4().hex[:8]
        self._updates: int | None = None
        self._metrics: Metrics = {}
        start = ServerStart(
            config=policy.spec.config, tokenizer_directory=tokenizer_directory.resolve(), precision=precision
        )
        self.precision = world.first(lambda: self._start(target, start))

    def load(self, *, updates: int) -> None:
        """Send the policy's weights, of so many updates, unless the server has them: piece by piece, so that they are
        never whole on the host."""
        if updates == self._updates:
            return
        began = time.perf_counter()
        self._updates = None  # until all of it is there
        adapter = self._policy.spec.adapter
        held = None if adapter is None else self._policy.adapter_weights()
        for index, names in enumerate(self._pieces):
            tensors = self._policy.weights(names)
            if adapter is not None and held is not None:
                tensors = merge(self._model, adapter, tensors, held)
            self._send(tensors, version=self._version(updates), done=index == len(self._pieces) - 1)
        self._updates = updates
        self._metrics = {"timing_s/switch": time.perf_counter() - began}

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """See `diptych.engine.Model.generate`. Margins that the server does not give are infinite. Raises UserError and
        InvariantError as `read_answer` does."""
        assert self._updates is not None, "load comes before generate"
        version = self._version(self._updates)
        rows = [row[real].tolist() for row, real in zip(prompts.tokens, prompts.attention, strict=True)]
        request = Request(prompts=rows, sampling=sampling, uniforms=uniforms)

        def ask() -> Completions:
            assert self._server is not None, "process 0 has started it"
            return read_answer(
                self._server.generate(request),
                request,
                version=version,
                vocab_size=self._model.vocab_size,
                pad_token_id=pad_token_id,
                dtype=self._dtype,
                where=self.where,
            )

        return self._world.first(ask)

    def rollout_metrics(self) -> Metrics:
        """`timing_s/switch`: seconds that sending took; empty where nothing was sent since this was last asked."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> ServedPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, target: str, start: ServerStart) -> Precision:
        server = load_target(self.where, target)(start)
        if not isinstance(server, RolloutServer):
            wanted = [name for name in ("precision", "load_weights", "generate", "close") if not hasattr(server, name)]
            raise UserError(f"{self.where}: {type(server).__name__} has no {', '.join(wanted)}")
        if server.precision not in get_args(Precision):
            server.close()
            raise UserError(
                f"{self.where}: precision {server.precision!r} is none of {', '.join(get_args(Precision))} (of "
                "several, name the coarsest; of anything coarser, bfloat16)"
            )
        self._server = server
        return server.precision

    def _send(self, tensors: Tensors, *, version: str, done: bool) -> None:
        def send() -> None:
            assert self._server is not None, "process 0 has started it"
            self._server.load_weights(tensors, version=version, done=done)

        self._world.first(send)

    def _version(self, updates: int) -> str:
        return f"{self._mark}-{updates}"
