"""Checkpoints that move between numbers of processes and ZeRO stages: the cases, and what two processes do with them.

    torchrun --nproc-per-node 2 -m torch_impl.tests.checkpoint_cases FOLDER

FOLDER/CASE/one is the checkpoint that one process left, which these two go on from; they leave FOLDER/CASE/two, and
what they see as STATION.npz.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from diptych.engine import (
    AdapterSpec,
    EngineSettings,
    Loss,
    Model,
    ModelSpec,
    OptimizerSpec,
    Precision,
    TokenBatch,
    TrainBatch,
    load_engine,
)
from diptych.errors import UserError
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model, tensor_shapes
from diptych.layout import Layout, Zero

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,  # odd sizes: partitions end within parameters, and are padded
    "hidden_size": 12,
    "intermediate_size": 17,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}
ADAMW = OptimizerSpec(name="adamw", eps=1e-4, weight_decay=0.1, max_grad_norm=0.3, ema_decay=0.9)
SGD = OptimizerSpec(name="sgd", momentum=0.9, weight_decay=0.1, max_grad_norm=0.3)
ADAPTER = AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "mlp.up_proj"))
# At stage 3 every tensor is cut, however small, and the optimizer has several flat tensors.
SPLIT = {"stage3_param_persistence_threshold": 0, "sub_group_size": 400}
UPDATES = 2  # before the checkpoint, and again after it


@dataclass(frozen=True, kw_only=True)
class Case:
    """Saved with one partitioning, gone on from with another, on another number of processes."""

    saved: Zero
    loaded: Zero
    precision: Precision = "float64"
    optimizer: OptimizerSpec = ADAMW
    adapter: AdapterSpec | None = None
    tied: bool = False


CASES = {
    "stage 3 to 1, tied": Case(saved=Zero(stage=3), loaded=Zero(stage=1), tied=True),
    "stage 2 to 0, SGD": Case(saved=Zero(stage=2), loaded=Zero(stage=0), optimizer=SGD),
    "stage 0 to 2, tied": Case(saved=Zero(stage=0), loaded=Zero(stage=2), tied=True),
    "stage 3 to 3": Case(saved=Zero(stage=3), loaded=Zero(stage=3)),
    "stage 3 to 2, adapter": Case(saved=Zero(stage=3), loaded=Zero(stage=2), adapter=ADAPTER),
    "bfloat16, stage 1 to 3": Case(saved=Zero(stage=1), loaded=Zero(stage=3), precision="bfloat16"),
    "bfloat16, stage 2 to 1": Case(saved=Zero(stage=2), loaded=Zero(stage=1), precision="bfloat16"),
    "offloaded, stage 3 to 1": Case(
        saved=Zero(stage=3, offload_optimizer=True, offload_param=True), loaded=Zero(stage=1), precision="float32"
    ),
    "stage 2 to offloaded 2": Case(
        saved=Zero(stage=2), loaded=Zero(stage=2, offload_optimizer=True), precision="float32"
    ),
}


def build(case: Case, zero: Zero, *, distributed: bool, seed: int = 0) -> Model:
    """The case's model with hot weights (an adapter's base is the same for every seed)."""
    config = {**CONFIG, "tie_word_embeddings": case.tied}
    settings = EngineSettings(
        precision=case.precision,
        layout=Layout(zero=zero),
        distributed=distributed,
        deepspeed={"zero_optimization": SPLIT} if zero.stage == 3 else {},
    )
    model = read_model(config)
    adapted = {} if case.adapter is None else hot(adapter_shapes(model, case.adapter), seed)
    return load_engine("torch", settings).model(
        ModelSpec(
            config=config,
            weights=hot(tensor_shapes(model, "lm"), 0 if case.adapter else seed),
            head="lm",
            optimizer=case.optimizer,
            micro_batch_size=2,
            adapter=case.adapter,
            adapter_weights=adapted,
        )
    )


def hot(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.15, shape) + ("norm" in name) for name, shape in shapes.items()}


def updates(model: Model, first: int) -> list[float]:
    """`UPDATES` of them, the first of which is number `first` of the run. Returns the losses."""
    rng = np.random.default_rng(1)
    attention = np.ones((4, 9), bool)
    attention[0, :4] = False
    batch = TrainBatch(
        tokens=TokenBatch(
            tokens=rng.integers(0, CONFIG["vocab_size"], attention.shape).astype(np.int32),
            attention=attention,
            positions=(np.maximum(attention.cumsum(axis=1) - 1, 0) * attention).astype(np.int32),
        ),
        arrays={"weight": rng.normal(size=attention.shape)},
        denominators={"total": 20.0},
    )
    loss = Loss(function=lambda logprobs, weight, total: (-(logprobs * weight).sum() / total, {}), reads="logprobs")
    return [
        model.update(loss, batch, learning_rate=1e-3 * (1 + step))["loss"] for step in range(first, first + UPDATES)
    ]


def state(model: Model) -> dict[str, np.ndarray]:
    """Everything that training changes, in canonical names."""
    moments = model.optimizer_state()
    parts = {"first": moments.first, "second": moments.second}
    parts["weights"] = model.weights() if model.spec.adapter is None else model.adapter_weights()
    if model.spec.optimizer is not None and model.spec.optimizer.ema_decay is not None:
        parts["average"] = model.ema_weights()
    found = {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
    return found | {"step": np.array(moments.step)}


def started(case: Case, folder: Path, *, distributed: bool) -> Model:
    """The model after its first updates, and a checkpoint of it."""
    model = build(case, case.saved, distributed=distributed)
    updates(model, 0)
    model.save_checkpoint(folder)()
    return model


def resumed(case: Case, zero: Zero, folder: Path, *, distributed: bool) -> Model:
    """Another model that was trained already, and then takes up a checkpoint."""
    model = build(case, zero, distributed=distributed, seed=1)
    updates(model, 0)
    model.load_checkpoint(folder)
    return model


def stations(case: Case, folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Two processes save a checkpoint and go on, also from it; and go on from that of one process."""
    model = started(case, folder / "two", distributed=True)
    yield "saved", state(model)
    updates(model, UPDATES)
    yield "went on", state(model)
    for source, zero, station in (("two", case.saved, "resumed"), ("one", case.loaded, "moved")):
        model = resumed(case, zero, folder / source, distributed=True)
        yield station, state(model)
        updates(model, UPDATES)
        yield f"{station} and went on", state(model)


def fail(folder: Path) -> str:
    """Process 1's disk is full: what this process is told, and how soon."""
    model = build(Case(saved=Zero(stage=2), loaded=Zero(stage=2)), Zero(stage=2), distributed=True)
    rank, start = torch.distributed.get_rank(), time.monotonic()
    full = mock.patch("torch.save", side_effect=OSError("disk full"))
    try:
        with full if rank == 1 else mock.MagicMock():
            model.save_checkpoint(folder)
    except (OSError, RuntimeError, UserError) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    assert not (folder / "diptych.json").exists()
    torch.distributed.barrier()
    return f"{said} ({'at once' if time.monotonic() - start < 60 else 'late'})"


def main(folder: Path) -> None:
    for name, case in CASES.items():
        for station, found in stations(case, folder / name):
            if torch.distributed.get_rank() == 0:
                np.savez(folder / name / f"{station}.npz", allow_pickle=False, **found)
    said = fail(folder / "full")
    (folder / f"said {torch.distributed.get_rank()}").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
