"""Several processes: what launchers say, which rows are whose, and how results come together again.

The rows are dealt out here for processes that do not exist: what real ones do is in parity_tests/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diptych.algorithms.losses import pairwise_reward_loss
from diptych.engine import Completions, Loss, TrainBatch
from diptych.errors import UserError
from diptych_torch import data_parallel
from diptych_torch.data_parallel import Share, gather_completions, gather_rows, no_completions, take_array, take_tokens
from diptych_torch.processes import Launched, launched_by
from diptych_torch.training import accumulate

# -- launchers ---------------------------------------------------------------------------------------------------------

ADDRESS = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
SAID = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS},
    "srun": {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **ADDRESS},
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **ADDRESS,
    },
    "torchrun inside of srun": {
        "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS,
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", SAID)
def test_launchers_are_recognised(launcher):
    assert launched_by(SAID[launcher]) == Launched(rank=5, count=8, local=1, address="node-1:29500")


INCOMPLETE = {
    "nobody": ({}, "nothing says which processes belong together"),
    "an address alone": (ADDRESS, "nothing says which processes belong together"),
    "torchrun without an address": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        "torchrun or deepspeed set RANK, but MASTER_ADDR, MASTER_PORT are not set",
    ),
    "a rank alone": ({"RANK": "0", **ADDRESS}, "WORLD_SIZE, LOCAL_RANK are not set"),
    "srun without a port": (
        {**SAID["srun"], "MASTER_PORT": ""}, "Slurm set SLURM_PROCID, but MASTER_PORT is not set",
    ),
    "mpirun without a size": (
        {name: text for name, text in SAID["mpirun"].items() if name != "OMPI_COMM_WORLD_SIZE"},
        "Open MPI set OMPI_COMM_WORLD_RANK, but OMPI_COMM_WORLD_SIZE is not set",
    ),
    "no number": ({**SAID["torchrun"], "RANK": "first"}, "RANK is 'first', which is no number"),
    "a port by name": ({**SAID["torchrun"], "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is no number"),
    "a rank too many": ({**SAID["torchrun"], "RANK": "8"}, "RANK is 8 of WORLD_SIZE = 8: ranks begin at 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_launcher_that_says_too_little_is_refused(case):
    environment, message = INCOMPLETE[case]
    with pytest.raises(UserError, match=message):
        launched_by(environment)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (0, 6), (6, 12), (4, 12), (10, 20)])
def test_every_row_is_one_processs(start, stop, count, group):
    shares = [Share(index, count).rows(start, stop, group) for index in range(count)]
    assert len({len(rows) for rows in shares}) == 1  # each makes the same passes
    every = np.concatenate(shares)
    assert every[every >= 0].tolist() == list(range(start, stop))
    assert (every < 0).sum() == Share(0, count).filler(stop - start, group)
    assert (every < 0).sum() < count * group
    for rows in shares:
        pairs = rows.reshape(-1, group)
        assert np.all((pairs < 0).all(axis=1) | (pairs[:, -1] - pairs[:, 0] == group - 1))
        assert np.all((pairs[:, 0] < 0) | ((pairs[:, 0] - start) % group == 0))


def test_filler_is_padding_alone(make_batch):
    batch = make_batch(rows=4)
    taken = take_tokens(batch, np.array([2, -1, 0]))
    for name in ("tokens", "attention", "positions"):
        found, whole = getattr(taken, name), getattr(batch, name)
        assert found.dtype == whole.dtype
        np.testing.assert_array_equal(found[[0, 2]], whole[[2, 0]])
        assert not found[1].any()
    assert taken.first == batch.first
    for array in (batch.tokens + 1, np.array([True, True, True, True]), np.array([1.5, 2.5, 3.5, 4.5])):
        part = take_array(array, np.array([-1, 3, -1]))
        assert part.dtype == array.dtype
        np.testing.assert_array_equal(part[1], array[3])
        assert not part[[0, 2]].any()


@pytest.fixture
def exchange(monkeypatch):
    """Runs a collective function once in each of so many make-believe processes: what each gives, each gets of all."""

    def run(count: int, call: Callable[[int], Any]) -> list[Any]:
        given: list[Any] = []

        class Collected(Exception):
            pass

        def collect(every: list[Any], mine: Any) -> None:
            given.append(mine)
            raise Collected

        def hand_out(every: list[Any], mine: Any) -> None:
            for index, one in enumerate(given):
                if isinstance(one, torch.Tensor):
                    every[index].copy_(one)
                else:
                    every[index] = one

        results = []
        for gather in (collect, hand_out):
            fake = SimpleNamespace(get_world_size=lambda: count, all_gather=gather, all_gather_object=gather)
            monkeypatch.setattr(data_parallel, "dist", fake)
            for index in range(count):
                try:
                    results.append(call(index))
                except Collected:
                    assert gather is collect
        return results

    return run


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bool])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 6), (4, 4), (4, 6), (6, 13)])
def test_outputs_come_back_in_the_batchs_order(exchange, processes, size, count, kind):
    """Of micro-batches of `size` rows, the last of which may be smaller."""
    outputs = torch.arange(count * 2).view(count, 2)
    outputs = outputs % 3 == 0 if kind == torch.bool else outputs.to(kind)

    def of(index: int) -> torch.Tensor:
        rows = [Share(index, processes).rows(start, min(start + size, count)) for start in range(0, count, size)]
        mine = torch.tensor(np.concatenate(rows))
        parts = outputs[mine.clamp(min=0)]
        parts[mine < 0] = True if kind == torch.bool else 99
        return gather_rows(parts, size, count)

    found = exchange(processes, of)
    assert len(found) == processes
    for one in found:
        assert one.dtype == kind
        assert torch.equal(one, outputs)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_completions_come_back_in_the_batchs_order(exchange, count, group, extra):
    """Of three groups of processes that decode together. extra: rows that a group decodes for others' sake."""
    every = Completions(
        tokens=np.arange(count * 2, dtype=np.int32).reshape(count, 2), mask=np.ones((count, 2), bool),
        logprobs=-np.arange(count * 2.0).reshape(count, 2), margins=np.arange(count * 2.0).reshape(count, 2) / 7,
        finish=np.arange(count, dtype=np.int32) % 2,
    )  # fmt: skip

    def of(index: int) -> Completions:
        rows = np.concatenate([np.arange(index // group, count, 3), np.zeros(extra, int)])
        if not len(rows):
            return gather_completions(no_completions(2, np.float64), count, group)
        mine = Completions(**{name: array[rows] for name, array in vars(every).items()})
        return gather_completions(mine, count, group)

    found = exchange(3 * group, of)
    assert len(found) == 3 * group
    for one in found:
        for name, array in vars(every).items():
            np.testing.assert_array_equal(getattr(one, name), array, err_msg=name)
            assert getattr(one, name).dtype == array.dtype


# -- shares of a step --------------------------------------------------------------------------------------------------


def likelihood(logprobs: Any, *, entropy: Any, weight: Any, total: float) -> Any:
    return -(logprobs * weight).sum() / total, {"entropy": (entropy * weight).sum() / total, "w_max": weight.max()}


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("kind", "size"), [("tokens", 1), ("tokens", 2), ("tokens", 6), ("pairs", 2), ("pairs", 6)])
def test_the_shares_of_a_step_add_up_to_it(make_model, make_batch, wanted, kind, size, processes):
    """Losses, metrics and gradients of each process's rows, filler among them; a process that wants no token too."""
    batch = make_batch(rows=6)
    model = make_model(head="lm" if kind == "tokens" else "scalar", precision="float64")
    network = model._network
    if kind == "tokens":
        weight = wanted(batch) * np.random.default_rng(2).normal(size=batch.tokens.shape)
        loss, group = Loss(function=likelihood, reads="logprobs", entropy=True), 1
        data = TrainBatch(tokens=batch, arrays={"weight": weight}, denominators={"total": 31.0})
    else:
        ends = np.zeros(batch.tokens.shape, bool)
        ends[np.arange(6), [10, 7, 10, 10, 10, 10]] = True
        loss, group = Loss(function=pairwise_reward_loss, reads="scores", options=(("center_coef", 0.1),), group=2), 2
        data = TrainBatch(tokens=batch, arrays={"end_mask": ends}, denominators={"num_pairs": 3.0})

    def step(share: Share) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        weights = network.named_weights()
        for one in weights.values():
            one.requires_grad_(True).grad = None
        rows = [share.rows(start, min(start + size, 6), group) for start in range(0, 6, size)]
        totals = accumulate(
            lambda *inputs, last, **options: network(*inputs, **options), loss, data, rows,
            lambda value: value.backward(), network=network, chunk=4, device=torch.device("cpu"),
        )  # fmt: skip
        return totals, {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in weights.items()}

    whole, gradients = step(Share(0, 1))
    parts = [step(Share(index, processes)) for index in range(processes)]
    for name, value in whole.items():
        join = max if name.endswith("_max") else sum
        assert join(part[0][name] for part in parts) == pytest.approx(value, rel=1e-12, abs=1e-13), name
    for name, value in gradients.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), value, rtol=1e-11, atol=1e-13)
    assert max(float(one.abs().max()) for one in gradients.values()) > 1e-3


def test_canary_a_pair_that_is_parted_is_seen():
    rows = [Share(index, 2).rows(0, 2) for index in (0, 1)]
    assert [part.tolist() for part in rows] == [[0], [1]]
    with pytest.raises(ValueError, match="pairs lie in neighbouring rows"):
        pairwise_reward_loss(np.zeros((1, 3)), end_mask=np.ones((1, 3), bool), num_pairs=1.0, center_coef=0.0)
