"""A loss over the micro-batches of an optimizer step, and its gradient.

Every micro-batch is a share of the step: losses and metrics come divided by global denominators (law 4), so that they
add up over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.engine import Loss, Metrics, TokenBatch, TrainBatch
from diptych_torch.data_parallel import add_tensors, take_array, take_tokens
from diptych_torch.experts import balance_loss
from diptych_torch.model import Network, device_array, device_batch

Run = Callable[..., Any]  # a network's forward, or DeepSpeed's around it; `last`: the step's last micro-batch
Backward = Callable[[Tensor], None]


def check_batch(loss: Loss, batch: TrainBatch, size: int) -> None:
    """ValueError for a batch that cannot be cut into micro-batches of `size` rows, or a loss that asks for nonsense."""
    count = len(batch.tokens)
    if loss.entropy and loss.reads != "logprobs":
        raise ValueError("a loss that reads scores has no entropy")
    if not count or (count > size and count % size):
        raise ValueError(f"{count} rows cannot be cut into micro-batches of {size}")
    for name, array in batch.arrays.items():
        if len(array) != count:
            raise ValueError(f"array {name!r} has {len(array)} rows, the tokens have {count}")


def accumulate(
    run: Run,
    loss: Loss,
    batch: TrainBatch,
    pieces: Sequence[np.ndarray],
    backward: Backward | None,
    *,
    network: Network,
    chunk: int,
    device: torch.device,
) -> Metrics:
    """Run the loss over this process's micro-batches, `backward` on each. Their sums of the loss and its metrics
    (`_max`: maxima).

    pieces: rows of each micro-batch, -1 for a row of padding (`data_parallel.Share.rows`); every process has as many.
    """
    denominators = {name: float(value) for name, value in batch.denominators.items()}
    wide = torch.promote_types(network.dtype, torch.float32)
    is_balanced = loss.balance > 0 and network.num_experts > 0
    is_whole = len(pieces) == 1 and torch.distributed.get_world_size() == 1
    choices = _choices(run, batch.tokens, pieces, network, device) if is_balanced and not is_whole else None
    num_tokens = int(batch.tokens.attention.sum())
    totals: Metrics = {}
    for index, rows in enumerate(pieces):
        outputs, entropy, routing = run(
            device_batch(take_tokens(batch.tokens, rows), network.config, device),
            temperature=loss.temperature,
            chunk=chunk,
            entropy=loss.entropy,
            routing=is_balanced,
            last=index == len(pieces) - 1,
        )
        inputs: dict[str, Any] = {
            name: device_array(take_array(array, rows), wide, device) for name, array in batch.arrays.items()
        }
        if loss.entropy:
            inputs["entropy"] = entropy
        value, metrics = loss(outputs, **inputs, **denominators)
        if metrics.keys() & {"loss", "grad_norm"}:
            raise ValueError("a loss's metrics must not be called loss or grad_norm: those names are the engine's")
        if is_balanced:
            balance, about_routers = balance_loss(routing, choices, network.config, num_tokens)
            value, metrics = value + loss.balance * balance, {**metrics, **about_routers}
        if backward is not None:
            backward(value)
        for name, number in {"loss": value, **metrics}.items():
            number = float(number.detach() if isinstance(number, Tensor) else number)
            if name not in totals:
                totals[name] = number
            else:
                totals[name] = max(totals[name], number) if name.endswith("_max") else totals[name] + number
    return totals


@torch.no_grad()
def _choices(
    run: Run, tokens: TokenBatch, pieces: Sequence[np.ndarray], network: Network, device: torch.device
) -> Tensor:
    """How many times each expert is chosen in the whole step [experts]: a pass over all micro-batches, because the
    balance loss of each depends on the choices in all of them."""
    counts = [
        run(
            device_batch(take_tokens(tokens, rows), network.config, device),
            routing=True, only_routing=True, last=False,
        )[2][1]
        for rows in pieces
    ]  # fmt: skip
    total = torch.stack(counts).sum(dim=0)
    add_tensors({"choices": total})
    return total
