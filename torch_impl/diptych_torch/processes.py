"""Bringing up torch.distributed, for one process or many, and DeepSpeed in it, kept quiet.

Whoever starts several processes says how they find each other: `torchrun`, the `deepspeed` launcher (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), Slurm (`srun`; MASTER_ADDR and MASTER_PORT from the batch script) or Open MPI.
One process needs no launcher: it is a group of its own that opens no port and leaves no address behind, so that its
child processes can be engines too.

What DeepSpeed does on a CPU unless it is told not to: compile a C++ extension for two minutes at start-up, and look for
MPI where no launcher set the ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diptych.allocator import keep_freed_memory
from diptych.engine import EngineSettings, Memory
from diptych.errors import UserError
from diptych.world import SINGLE, World

# How long a process waits for the others, at the start and in every exchange: process 0 may work alone for long
# (reward functions, exports). A process that dies is noticed by its launcher, not by this.
TIMEOUT = timedelta(hours=3)
# Seconds that a process waits before it ends (`_leave`).
PAUSE = 1.0
# Who says which process this is: rank, number of processes, number on its host.
LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What a launcher says: process `rank` of `count`, number `local` on its host; address: host:port of process 0."""

    rank: int
    count: int
    local: int
    address: str


def start(settings: EngineSettings) -> torch.device:
    """Bring up torch.distributed for this process. Returns its device: the accelerator that is there (or that the
    variable DS_ACCELERATOR names), with settings.device "cpu" none.

    The first start chooses for the process, as far as DeepSpeed has one accelerator a process; later calls change
    nothing. Raises UserError where "cpu" comes after an accelerator was started, and where the settings and the
    launcher do not say the same about how many processes there are.
    """
    launched = launched_by(os.environ) if settings.distributed else None
    if launched is None and (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"WORLD_SIZE is {count}: a launcher started several processes: add --distributed, or start one without it"
        )
    if settings.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(launched.local if launched else 0))  # DeepSpeed reads it, set or not
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    _quiet()
    if settings.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    # Compiled at the first start (125 s here); used by inference_all_reduce only, never in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator: Any = get_accelerator()
    found = accelerator.device_name()
    if settings.device == "cpu" and found != "cpu":
        raise UserError(f"this process already runs on {found}: a model on the CPU needs a process of its own")
    local = int(os.environ["LOCAL_RANK"])
    if found != "cpu" and local >= accelerator.device_count():
        raise UserError(
            f"process {local} of this host has no {found} device of its own ({accelerator.device_count()} are here): "
            "start as many processes on each host as it has devices"
        )
    accelerator.set_device(local)
    if not deepspeed.comm.is_initialized():
        backend = accelerator.communication_backend_name()
        if not dist.is_initialized():
            _join(backend, launched)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return torch.device(accelerator.current_device_name())


def launched_by(environment: Mapping[str, str]) -> Launched:
    """What the launcher says of this process. UserError where no launcher is recognised, or what it says is
    incomplete."""
    for launcher, (rank, count, local) in LAUNCHERS.items():
        if rank not in environment:
            continue
        missing = [name for name in (count, local, *ADDRESS) if not environment.get(name)]
        if missing:
            raise UserError(
                f"--distributed: {launcher} set {rank}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
                " not set (docs/clusters.md shows how each launcher is used)"
            )
        numbers = {name: environment[name] for name in (rank, count, local, ADDRESS[1])}
        for name, text in numbers.items():
            if not text.isdigit():
                raise UserError(f"--distributed: {name} is {text!r}, which is no number")
        found = Launched(
            rank=int(numbers[rank]),
            count=int(numbers[count]),
            local=int(numbers[local]),
            address=f"{environment[ADDRESS[0]]}:{environment[ADDRESS[1]]}",
        )
        if found.rank >= found.count:
            raise UserError(f"--distributed: {rank} is {found.rank} of {count} = {found.count}: ranks begin at 0")
        return found
    raise UserError(
        "--distributed: nothing says which processes belong together: start them with torchrun, deepspeed or srun "
        "(docs/clusters.md); for one process leave --distributed away"
    )


def world() -> World:
    """This process among the others."""
    if dist.get_world_size() == 1:
        return SINGLE
    # Messages of the hinge are on the host: they need no accelerator.
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(message: np.ndarray) -> np.ndarray:
        mine = torch.from_numpy(np.array(message))
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine, group=group)
        return torch.stack(every).numpy()

    return World(index=dist.get_rank(), count=dist.get_world_size(), gather=gather)


def memory(device: torch.device) -> Memory:
    """What each process may fill: the least free on any of their accelerators, and the smallest share of a host's free
    memory. Collective."""
    here = socket.gethostname()
    hosts: list[Any] = [here]
    if dist.get_world_size() > 1:
        hosts = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, here)
    free = torch.tensor([_free_on_host() // hosts.count(here), 0], dtype=torch.int64, device=device)
    if device.type == "cuda":
        free[1] = torch.cuda.mem_get_info(device)[0]
    if dist.get_world_size() > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return Memory(host=int(free[0]), device=int(free[1]) if device.type == "cuda" else None)


def _free_on_host() -> int:
    """Bytes that programs may still take here; a container's limit counts (cgroup v2)."""
    import psutil  # DeepSpeed needs it too

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        free = min(free, max(0, limit - used))
    return free


def _join(backend: str, launched: Launched | None) -> None:
    if launched is None or launched.count == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{launched.address}",
            rank=launched.rank,
            world_size=launched.count,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"--distributed: process {launched.rank} of {launched.count} could not join the others at "
            f"{launched.address}: {error}"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    """At the end of a process that was one of several.

    gloo's threads let go of the last exchange's tensors a moment after it is done, and need the interpreter for that:
    where it is gone by then, the process aborts ("terminate called without an active exception") although all went
    well. Two processes on one core did so in 8 of 20 exits, and in none of 46 with a pause.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(PAUSE)


def _quiet() -> None:
    """DeepSpeed's notices to the log, not to stdout, which belongs to the user."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in list(logger.handlers):
        if type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
    logger.propagate = True
    # Printed at every start of stage 1 in bfloat16; and it forgets the peak of the accelerator's memory.
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed's calls of torch.distributed under names that torch renames; at every step, and not the user's to mend.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
