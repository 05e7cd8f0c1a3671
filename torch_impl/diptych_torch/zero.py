"""DeepSpeed's configuration from the recipe's, and what is done with its engines: the one place that knows both.

Losses come in divided by global denominators, so DeepSpeed gets one accumulation step and its boundaries by hand, and
its mean over processes is undone by their number (`engine.TorchModel.update`). At stage 0 it neither clips nor sees
bfloat16: in both its numbers would not be those of the other stages.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.layout import Zero
from diptych_torch.float64 import masters_in_float64

# Tensors of fewer elements stay whole in stage 3 (DeepSpeed's own default, named here).
PERSISTENCE_THRESHOLD = 100_000
# Elements of DeepSpeed's buckets, and less for models that have less. (Its own default, 500 million, stays allocated at
# stage 3, once for every trained model: 2 GB each in float32.)
BUCKET = 100_000_000
# Elements that stage 3 may hold gathered, that it keeps for a next use so near, and that the optimizer updates at once
# (DeepSpeed's own defaults, named here).
LIVE = REUSE = SUB_GROUP = 1_000_000_000
# Keys that have a value here and may have another in the recipe's `deepspeed` block: sizes, and how sums are rounded.
FREE = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.sub_group_size",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
)
# Keys of DeepSpeed's configuration that the recipe decides, and where.
OF_THE_RECIPE = {
    "optimizer": "*.optimizer",
    "scheduler": "*.optimizer.schedule",
    "train_batch_size": "*.batch_size",
    "fp16": "precision",
    "hybrid_engine": "rollout.engine",
    "activation_checkpointing": "layout.remat",
    "checkpoint": "checkpoint.every",
    "nebula": "checkpoint.every",
    "datastates_ckpt": "checkpoint.every",
    "zero_optimization.elastic_checkpoint": "layout.zero.stage (every checkpoint is read at every stage)",
    "zero_optimization.stage": "layout.zero.stage",
    "zero_optimization.offload_optimizer": "layout.zero.offload_optimizer",
    "zero_optimization.offload_param": "layout.zero.offload_param",
    "gradient_clipping": "*.optimizer.max_grad_norm",
    "bf16": "precision",
    "data_types": "precision",
    "train_micro_batch_size_per_gpu": "*.micro_batch_size",
    "gradient_accumulation_steps": "*.batch_size and *.micro_batch_size",
}


def world_size() -> int:
    """Processes over which DeepSpeed averages gradients."""
    return dist.get_world_size()


def ds_config(
    zero: Zero,
    *,
    elements: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    max_grad_norm: float | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """DeepSpeed's configuration. elements: numbers that are trained. micro_batch_size: rows on one process. more: the
    recipe's `deepspeed` block, whose keys are added. Raises UserError where it says what the recipe says already."""
    bucket = min(elements + elements % 2, BUCKET)  # DeepSpeed takes even numbers only
    partitioning: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket // 10,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": REUSE,
        "sub_group_size": SUB_GROUP,
        # DeepSpeed's two ways to sum gradients differ in what types they take.
        "reduce_scatter": dtype != torch.float64,
    }
    if zero.offload_optimizer:
        partitioning["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload_param:
        partitioning["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (max_grad_norm or 0.0) if zero.stage > 0 else 0.0,
        "prescale_gradients": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW on the host too: DeepSpeed's own is compiled at the first start, and is another formula's code.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": partitioning,
    }
    if dtype == torch.bfloat16:  # sums over micro-batches and over processes in float32
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return added(config, more)


def added(config: Mapping[str, Any], more: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`config` with the keys of `more`. Raises UserError for a key that the recipe decides, or that `config` has and is
    not `FREE`."""
    merged = dict(config)
    for key, value in more.items():
        place = f"{path}{key}"
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping) and place not in OF_THE_RECIPE:
            merged[key] = added(config[key], value, f"{place}.")
        elif place in OF_THE_RECIPE:
            raise UserError(f"deepspeed.{place}: the recipe decides this: set {OF_THE_RECIPE[place]} instead")
        elif key in config and place not in FREE:
            raise UserError(f"deepspeed.{place}: Diptych sets it to {config[key]!r}, and its numbers rest on that")
        else:
            merged[key] = value
    return merged


def initialize(
    network: nn.Module, optimizer: torch.optim.Optimizer | None, config: Mapping[str, Any], *, dtype: torch.dtype
) -> Any:
    """`deepspeed.initialize`: of a trained network with its optimizer, or of a frozen one that stage 3 partitions."""
    import deepspeed

    is_float64 = dtype == torch.float64
    with warnings.catch_warnings(), masters_in_float64() if is_float64 else contextlib.nullcontext():
        # Stages 1 to 3 import a part of torch that calls another part of torch by a deprecated name.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        with contextlib.redirect_stdout(sys.stderr):  # some of its optimizers print their memory
            engine, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
    if is_float64:
        engine.communication_data_type = torch.float64
    if optimizer is not None:
        # Some of DeepSpeed's optimizers make a step of zeros at the start and leave it counted (bias correction!).
        optimizer.state.clear()
    return engine


def release(engine: Any) -> None:
    """Give back the memory of a model that is no longer used, trained or frozen, and take DeepSpeed's hooks out of it.

    What the hooks refer to would never be freed. After an update at stage 3 something in DeepSpeed goes on referring to
    the model without them; so the tensors are emptied, whoever may hold them.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    optimizer, engine.optimizer = engine.optimizer, None
    for parameter in engine.module.parameters():
        parameter.grad = None
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.data.new_empty(0)
    basic = getattr(optimizer, "optimizer", None)  # what ZeRO is around
    if basic is not None:
        for flat in (flat for group in basic.param_groups for flat in group["params"]):
            flat.grad = None
            flat.data = flat.data.new_empty(0)
        basic.state.clear()
        vars(optimizer).clear()  # its buffers


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has partitioned are whole; `write`: what is written to them (by every process
    alike) stays. Of other parameters it changes nothing."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's own shape; stage 3 leaves it empty between uses."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def plain_linear() -> Iterator[None]:
    """Inside, linear layers are torch's own. For the whole process stage 3 replaces `torch.nn.functional.linear` by one
    that keeps no gathered weight for the backward pass, which costs time where there is none."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Replacer

    theirs = torch.nn.functional.linear
    torch.nn.functional.linear = getattr(Replacer, "linear_bk", theirs)
    try:
        yield
    finally:
        torch.nn.functional.linear = theirs


class Partition:
    """Puts tensors into a stage-3 model one at a time: each is on this process whole only while it is partitioned."""

    def __init__(self, config: Mapping[str, Any]):
        import deepspeed

        # Partitions whatever it is given; nothing is built inside of it.
        self._init = deepspeed.zero.Init(config_dict_or_path=dict(config), enabled=True)

    def __call__(self, parameter: nn.Parameter) -> None:
        self._init._convert_to_zero_parameters([parameter])


class Place(NamedTuple):
    """A piece of a parameter: `length` elements of it, flattened, from `start` on. They lie in the tensor number `flat`
    of `Shards.flats`, from `offset` on."""

    flat: int
    offset: int
    start: int
    length: int


class Shards:
    """This process's pieces of what the optimizer updates, at any stage: masters, and what it keeps beside them.

    A piece is (start, tensor): elements of the flattened parameter from `start` on. Stage 0 has every parameter whole;
    stages 1 and 2 cut all parameters together, laid end to end, into as many pieces as there are processes; stage 3
    cuts each parameter.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, stage: int):
        self._engine, self._optimizer, self.stage = engine, optimizer, stage

    def flats(self) -> list[Tensor]:
        """The tensors that the optimizer updates on this process."""
        if self.stage == 0:
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        zero = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(zero, name):
                return getattr(zero, name)
        raise AssertionError(f"a ZeRO optimizer of an unknown kind: {type(zero).__name__}")

    def place(self, parameter: nn.Parameter) -> Place:
        """Where this process's piece of a parameter lies."""
        if self.stage == 0:
            flat = next(index for index, one in enumerate(self.flats()) if one is parameter)
            return Place(flat, 0, 0, parameter.numel())
        if self.stage == 3:
            zero = self._engine.optimizer
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank() * size
            return Place(
                group, offset, start, max(0, min(size, whole_shape(parameter).numel() - start))
            )  # the last are padded
        found = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if found is None:
            return Place(0, 0, 0, 0)
        where = found.hp_fragment_address
        return Place(found.param_group_index, where.start, found.lp_fragment_address.start, where.numel)

    def piece(self, parameter: nn.Parameter, key: str | None = None) -> tuple[int, Tensor]:
        """The master's piece, or with `key` that of the optimizer's state; writing to it changes the original. Pieces
        may be empty."""
        flat, offset, start, length = self.place(parameter)
        return start, self._of(self.flats()[flat], key).detach().view(-1)[offset : offset + length]

    def read(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A copy of the whole master or state, in the parameter's shape, on every process. Collective."""
        start, piece = self.piece(parameter, key)
        shape = whole_shape(parameter)
        if self.stage == 0:
            return piece.clone().view(shape)
        full = torch.zeros(whole_shape(parameter).numel(), dtype=piece.dtype, device=self._engine.device)
        full[start : start + len(piece)] = piece.to(full.device)
        if world_size() > 1:
            dist.all_reduce(full)
        return full.view(shape)

    def write(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Replace the whole master or state; every process has all of `value`."""
        start, piece = self.piece(parameter, key)
        piece.copy_(value.reshape(-1)[start : start + len(piece)])

    def keys(self) -> list[str]:
        """The names of what the optimizer keeps beside the masters: moments, the average."""
        return [key for key in self._optimizer.state[self.flats()[0]] if key != "step"]

    def step(self) -> int:
        """Updates that the optimizer counts: those that were made."""
        return int(self._optimizer.state[self.flats()[0]]["step"])

    def set_step(self, step: int) -> None:
        for flat in self.flats():
            self._optimizer.state[flat]["step"].fill_(step)

    def _of(self, flat: Tensor, key: str | None) -> Tensor:
        return flat if key is None else self._optimizer.state[flat][key]
