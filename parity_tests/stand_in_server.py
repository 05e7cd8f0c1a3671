"""A rollout server in a process of its own: the torch engine behind a pipe, for the tests of `diptych.rollout_server`.

The factories are sound (`exact`, and `rounded`, whose weights are rounded to bfloat16) or broken in one way each. The
client in this process pickles calls into the child's standard input and reads what it returns from its output.

    python -m parity_tests.stand_in_server exact
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diptych.engine import Precision, PromptBatch
from diptych.rollout_server import Answer, Request, RolloutServer, ServerStart

ROOT = Path(__file__).parents[1]
made: list[Client] = []  # by this process, for the tests to look at


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; still float32."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Client(RolloutServer):
    """This process's end. versions: that were sent, in order."""

    def __init__(self, kind: str, precision: Precision, start: ServerStart):
        self.precision = precision
        self.versions: list[str] = []
        path = os.pathsep.join([str(ROOT), *(str(ROOT / name) for name in ("shared", "jax_impl", "torch_impl"))])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "parity_tests.stand_in_server", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._ask(("start", dict(start.config)))
        made.append(self)

    def load_weights(self, tensors: Mapping[str, np.ndarray], *, version: str, done: bool) -> None:
        self._ask(("load", dict(tensors), version, done))
        if done:
            self.versions.append(version)

    def generate(self, request: Request) -> Answer:
        return self._ask(("generate", request))

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)
        self._child.stdout.close()

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def _ask(self, call: tuple) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        pickle.dump(call, self._child.stdin)
        self._child.stdin.flush()
        return pickle.load(self._child.stdout)


def exact(start: ServerStart) -> Client:
    return Client("exact", "float32", start)


def rounded(start: ServerStart) -> Client:
    return Client("rounded", "bfloat16", start)


def stale(start: ServerStart) -> Client:
    """Keeps the weights that it got first."""
    return Client("stale", "bfloat16", start)


def corrupted(start: ServerStart) -> Client:
    """One tensor arrives transposed."""
    return Client("corrupted", "bfloat16", start)


class Child:
    """The other end."""

    def __init__(self, kind: str):
        self.kind = kind
        self.model: Any = None
        self.version = "none"
        self.arrived: dict[str, np.ndarray] = {}

    def start(self, config: dict[str, Any]) -> None:
        self.config = config

    def load(self, tensors: dict[str, np.ndarray], version: str, done: bool) -> None:
        from diptych.engine import EngineSettings, ModelSpec, load_engine

        for name, value in tensors.items():
            if self.kind == "corrupted" and name.endswith("layers.1.self_attn.o_proj.weight"):
                value = value.T.copy()
            self.arrived[name] = value if self.kind == "exact" else rounded_to_bfloat16(value)
        if not done or (self.kind == "stale" and self.model is not None):
            return
        if self.model is None:
            spec = ModelSpec(config=self.config, weights=self.arrived, head="lm", optimizer=None, micro_batch_size=8)
            self.model = load_engine("torch", EngineSettings(precision="float32", device="cpu")).model(spec)
        else:
            self.model.load_weights(self.arrived)
        self.version, self.arrived = version, {}

    def generate(self, request: Request) -> Answer:
        width = max(len(prompt) for prompt in request.prompts)
        tokens = np.zeros((len(request.prompts), width), np.int32)
        for row, prompt in enumerate(request.prompts):
            tokens[row, width - len(prompt) :] = prompt
        attention = np.arange(width) >= width - np.array([[len(prompt)] for prompt in request.prompts])
        positions = np.maximum(attention.cumsum(axis=1) - 1, 0).astype(np.int32)
        batch = PromptBatch(tokens=tokens, attention=attention, positions=positions)
        done = self.model.generate(batch, request.sampling, request.uniforms, pad_token_id=0)

        def lists(values: np.ndarray) -> list[list]:
            return [row[mask].tolist() for row, mask in zip(values, done.mask, strict=True)]

        greedy = request.sampling.temperature == 0
        margins = lists(done.margins) if greedy else None
        return Answer(version=self.version, tokens=lists(done.tokens), logprobs=lists(done.logprobs), margins=margins)


def main() -> None:
    # What a framework prints must not get between the answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        child = Child(sys.argv[1])
        while True:
            try:
                name, *inputs = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(getattr(child, name)(*inputs), answers)
            answers.flush()


if __name__ == "__main__":
    main()
