"""How much host memory does a 1.1 B model take to get in and out?

    python scripts/import_memory.py --engine jax --folder /tmp/memory

Writes a Llama of TinyLlama's shape with random weights, tensor by tensor, in shards; imports it with an engine,
computes the log-probabilities of 8 rows of 512 tokens, exports it, and compares checksums. For every step it prints the
resident memory before and after and the highest between (Linux: VmHWM, reset through /proc/self/clear_refs). The
promise for import and export: peak at most what stays resident and 1.3 times the largest shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diptych import random
from diptych.engine import ENGINES, EngineSettings, Model, ModelSpec, TokenBatch, load_engine
from diptych.weights.export import checkpoint_of, parse_size
from diptych.weights.huggingface import Checkpoint, initial_checkpoint, read_checkpoint, write_checkpoint
from diptych.weights.inspection import check_weights

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
ROWS, COLUMNS = 8, 512
MIB = 2**20
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes of resident memory before, at the peak and after; NaN where the system does not tell."""

    name: str
    before: float
    peak: float
    after: float
    seconds: float


class Memory:
    """Runs steps and keeps their measurements."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, name: str, work: Callable[[], Result]) -> Result:
        reset_peak()
        before, start = status("VmRSS"), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        step = Step(name=name, before=before, peak=status("VmHWM"), after=status("VmRSS"), seconds=seconds)
        self.steps.append(step)
        print(
            f"{name:<10} {step.before / MIB:8.0f} {step.peak / MIB:8.0f} {step.after / MIB:8.0f} MiB  {seconds:7.1f} s",
            flush=True,
        )
        return result


def status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return float("nan")
    line = next(line for line in path.read_text().splitlines() if line.startswith(field + ":"))
    return float(line.split()[1]) * 1024


def reset_peak() -> None:
    """Lower VmHWM to what is resident now; where that is not allowed, peaks are those since the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak cannot be reset here: peaks are those since the start", file=sys.stderr)


def measure(
    folder: Path, config: dict[str, Any], *, engine: str, device: str, dtype: str, shard: int, columns: int
) -> tuple[list[Step], dict[str, Any]]:
    """The steps, and what was found: mean log-probability, largest shard, whether checksums agree."""
    memory = Memory()
    source, output = folder / "source", folder / "export"
    print(f"{'step':<10} {'before':>8} {'peak':>8} {'after':>8}")

    def write() -> None:
        write_checkpoint(
            source,
            initial_checkpoint(config, seed=0),
            tokenizer_directory=folder,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_shard_bytes=shard,
        )

    def load() -> tuple[Checkpoint, Model]:
        checkpoint = read_checkpoint(source, precision="float32")
        spec = ModelSpec(
            config=checkpoint.config, weights=checkpoint.weights, head="lm", optimizer=None, micro_batch_size=1
        )
        return checkpoint, started.model(spec)

    memory.step("write", write)
    settings = EngineSettings(precision="float32", device=device)  # pyright: ignore[reportArgumentType]
    started = memory.step("start", lambda: load_engine(engine, settings))
    checkpoint, model = memory.step("import", load)
    tokens = np.stack([random.permutation(0, "memory/tokens", config["vocab_size"], step=row) for row in range(ROWS)])
    tokens = np.resize(tokens, (ROWS, columns)).astype(np.int32)
    positions = np.broadcast_to(np.arange(columns, dtype=np.int32), tokens.shape).copy()
    batch = TokenBatch(tokens=tokens, attention=np.ones(tokens.shape, bool), positions=positions)
    logprobs = memory.step("evaluate", lambda: model.logprobs(batch, temperature=1.0))
    memory.step(
        "export",
        lambda: write_checkpoint(
            output, checkpoint_of(model, like=checkpoint), tokenizer_directory=source, max_shard_bytes=shard
        ),
    )
    found = {
        "mean_logprob": float(logprobs[:, 1:].mean()),
        "largest_shard": max(file.stat().st_size for file in output.glob("*.safetensors")),
        "identical": check_weights(source)["checksum"] == check_weights(output)["checksum"],
    }
    return memory.steps, found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--device", choices=["auto", "cpu"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="on disk")
    parser.add_argument("--folder", type=Path, required=True, help="new; holds two copies of the model meanwhile")
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--small", action="store_true", help="a toy's shape, to try the script")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    shard = parse_size(options.max_shard_size)
    try:
        steps, found = measure(
            options.folder,
            CONFIG | (SMALL if options.small else {}),
            engine=options.engine,
            device=options.device,
            dtype=options.dtype,
            shard=shard,
            columns=64 if options.small else COLUMNS,
        )
    finally:
        shutil.rmtree(options.folder)
    print(f"largest shard {found['largest_shard'] / MIB:.0f} MiB; mean log-probability {found['mean_logprob']:.4f}")
    for step in steps:
        if step.name in ("import", "export"):
            extra = max(0.0, step.peak - max(step.before, step.after)) / found["largest_shard"]
            print(f"{step.name}: peak is what stays resident and {extra:.2f} of the largest shard (promise: 1.3)")
    print(f"exported tensors are {'' if found['identical'] else 'NOT '}those that were imported, byte for byte")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": [vars(step) for step in steps], **found}, indent=2) + "\n")
    return 0 if found["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
