"""DeepSpeed, kept quiet and given every setting: starting one process, ZeRO's configuration, whole parameters.

What DeepSpeed does on a CPU unless it is told not to: compile a C++ extension for two minutes at start-up, look for
MPI where no launcher set the ranks, and allocate gradient buckets of 2 GB for any model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from diptych.engine import OptimizerSpec
from diptych.errors import UserError

# Tensors of fewer elements stay whole in stage 3 (DeepSpeed's own default, named here).
PERSISTENCE_THRESHOLD = 100_000


def start(device: Literal["auto", "cpu"]) -> torch.device:
    """Bring up torch.distributed for this process. Returns its device: the accelerator that is there (or that the
    variable DS_ACCELERATOR names), with "cpu" none.

    The first start chooses for the process, as far as DeepSpeed has one accelerator a process. Raises UserError where
    "cpu" comes after an accelerator was started.

    Once per process; later calls change nothing. Without a launcher the process is a group of its own that opens no
    port and leaves no address behind, so that its child processes can be engines too.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, set or not
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: the torch engine runs in one process so far; "
            "start it without a launcher"
        )
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in list(logger.handlers):  # its own handler writes to stdout, which belongs to the user
        if type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
    logger.propagate = True
    # DeepSpeed's calls of torch.distributed under names that torch renames; at every step, and not the user's to mend.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Compiled at the first start (125 s here); used by inference_all_reduce only, never in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator: Any = get_accelerator()
    found = accelerator.device_name()
    if device == "cpu" and found != "cpu":
        raise UserError(f"this process already runs on {found}: a model on the CPU needs a process of its own")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if not deepspeed.comm.is_initialized():
        backend = accelerator.communication_backend_name()
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return torch.device(accelerator.current_device_name())


def world_size() -> int:
    """Processes over which DeepSpeed averages gradients."""
    return torch.distributed.get_world_size()


def initialize(
    network: nn.Module, optimizer: torch.optim.Optimizer, spec: OptimizerSpec, *, stage: int, micro_batch_size: int
) -> Any:
    """`deepspeed.initialize` of a trained network. Losses come in divided by global denominators, so DeepSpeed gets one
    accumulation step and its boundaries by hand. At stage 0 clipping is ours (`optimizer.clip`)."""
    import deepspeed

    elements = sum(parameter.numel() for parameter in network.parameters())
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (spec.max_grad_norm or 0.0) if stage > 0 else 0.0,
        "prescale_gradients": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements,
            "stage3_prefetch_bucket_size": elements,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        },
    }
    with warnings.catch_warnings():
        # Stages 1 to 3 import a part of torch that calls another part of torch by a deprecated name.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has partitioned are whole; `write`: what is written to them (by every process
    alike) stays. Of other parameters it changes nothing."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield
