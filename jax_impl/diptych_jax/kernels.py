"""Fused attention kernels: which one runs where, and both of them on each device's own rows and heads.

cuDNN's flash attention takes any boolean mask, as an additive one of [rows, 1, time, time] in the model's type. Pallas
splash attention knows a causal mask or window when it is compiled and never holds anything of [time, time]; segment ids
keep padding and neighbours in a packed row apart. XLA cannot partition either, so on a mesh each runs in a
`jax.shard_map`.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig
from diptych_jax.mesh import ROWS

Kernel = Literal["xla", "cudnn", "splash"]
LANES = 128  # splash works on blocks of whole lanes
LARGEST_BLOCK = 512
CUDNN_HEAD_DIM = 128  # 256 needs a Hopper


class Choice(NamedTuple):
    """Which implementation of attention a model runs, and why not a faster one."""

    name: Kernel
    reason: str


def choose(wanted: Literal["auto"] | Kernel, *, platform: str, dtype: Any, config: ModelConfig) -> Choice:
    """The attention of a model in training and scoring; decoding is XLA's everywhere.

    platform: of the devices (`jax.Device.platform`). dtype: of the activations. Raises UserError for a named kernel
    that this platform, type or model cannot run: it would be slower than asked for without a word.
    """
    fastest: Kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")  # pyright: ignore[reportAssignmentType]
    kernel = fastest if wanted == "auto" else wanted
    problem = None if kernel == "xla" else _problem(kernel, platform, jnp.dtype(dtype).name, config)
    if problem is None:
        return Choice(kernel, f"the fastest on {platform}" if kernel == fastest else "layout.attention names it")
    if wanted == "auto":
        return Choice("xla", f"not {kernel}: {problem}")
    raise UserError(f"layout.attention: {kernel} cannot run: {problem}; set it to auto or xla")


def _problem(kernel: Kernel, platform: str, dtype: str, config: ModelConfig) -> str | None:
    """Why a kernel cannot run; None where it can."""
    home, dtypes = {"cudnn": ("gpu", ("bfloat16", "float16")), "splash": ("tpu", ("bfloat16", "float32"))}[kernel]
    if platform != home:
        return f"it needs a {home.upper()}, and this is a {platform.upper()}"
    if dtype not in dtypes:
        return f"it computes in {' or '.join(dtypes)}, and the model in {dtype}"
    if not isinstance(config, DecoderConfig):
        return "a recurrent model has no attention"
    if config.alibi:
        return "it takes no ALiBi bias"
    if kernel == "cudnn" and config.attention_softcap is not None:
        return "it cannot cap scores"
    if kernel == "cudnn" and (config.head_dim % 8 or config.head_dim > CUDNN_HEAD_DIM):
        return f"its heads have a multiple of 8 up to {CUDNN_HEAD_DIM} columns, and the model's {config.head_dim}"
    return None


def cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """softmax(scale q k) v over the keys that the mask allows, at least one for each query. implementation: "xla"
    computes the same elsewhere, for tests."""
    lengths = q_BTNH.shape[1], k_BSKH.shape[1]
    # With a bias, which the mask becomes, the backward pass takes even lengths only.
    q_BTNH, k_BSKH, v_BSKH = (_padded(x, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    queries, keys = (size % 2 for size in lengths)
    mask_BTS = jnp.pad(jnp.pad(mask_BTS, ((0, 0), (0, 0), (0, keys))), ((0, 0), (0, queries), (0, 0)), mode="edge")

    def one_device(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation=implementation)

    return _per_device(one_device, q_BTNH, k_BSKH, v_BSKH, mask_BTS)[:, : lengths[0]]


def splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Column t reads the columns of its own segment up to itself, the last `window` of them where that is set.

    Rows are padded to whole blocks; what is appended reads itself only, so no query is left without a key. interpret:
    run the kernel's Python on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    length = q_BTNH.shape[1]
    # The kernel has no scale. Upcast: q is scaled in float32 and rounded once.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BTNH, k_BTKH, v_BTKH = (_padded(x, LANES) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, q_BTNH.shape[1] - length)), constant_values=-1)
    columns = q_BTNH.shape[1]
    block = math.gcd(columns, LARGEST_BLOCK)
    sizes = pallas.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    shape = (columns, columns)
    mask = pallas.CausalMask(shape) if window is None else pallas.LocalMask(shape, (window - 1, 0), 0)

    def one_device(q_BTNH, k_BTKH, v_BTKH, segments_BT):
        run = pallas.make_splash_mha_single_device(
            pallas.MultiHeadMask([mask] * q_BTNH.shape[2]),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        ids = pallas.SegmentIds(q=segments_BT, kv=segments_BT)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        return jnp.swapaxes(_splash(run, *heads_first, ids), 1, 2)

    return _per_device(one_device, q_BTNH, k_BTKH, v_BTKH, segments_BT)[:, :length]


@jax.custom_vjp
def _splash(run: Any, q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, ids: Any) -> Array:
    """A splash kernel (a pytree: it holds the blocks of its mask) that multiplies bfloat16 in one pass, forward and
    backward: the engine asks every product for "highest" precision, which Mosaic refuses for bfloat16. (The kernel also
    multiplies probabilities by values in float32; that takes one pass too, of what was bfloat16 before.)"""
    with _precision(q_BNTH):
        return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)


def _splash_forward(run, q, k, v, ids):
    with _precision(q):
        return jax.vjp(lambda q, k, v: jax.vmap(run)(q, k, v, ids), q, k, v)


def _splash_backward(transposed, change):
    with _precision(change):
        return None, *transposed(change), None


_splash.defvjp(_splash_forward, _splash_backward)


def _precision(x: Array) -> contextlib.AbstractContextManager:
    return jax.default_matmul_precision("default") if x.dtype == jnp.bfloat16 else contextlib.nullcontext()


def _padded(x: Float[Array, "B T N H"], multiple: int) -> Float[Array, "B P N H"]:
    """Zeros appended to axis 1, up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _per_device(kernel: Callable[..., Array], q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, rows: Array) -> Array:
    """`kernel(q, k, v, rows)` of each device's own rows and heads, on the mesh of the program that is being traced.

    Rows are split over data and fsdp, heads over tensor. Where there are fewer key-value heads than tensor shards, each
    device holds all of them and takes the one that its query heads read. What does not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, rows)
    sizes = dict(mesh.shape)
    row_axes = tuple(axis for axis in ROWS if axis in sizes)
    if len(q_BTNH) % math.prod(sizes[axis] for axis in row_axes):
        row_axes = ()
    heads, kv_heads, shards = q_BTNH.shape[2], k_BSKH.shape[2], sizes.get("tensor", 1)
    splits_kv = kv_heads % shards == 0
    splits = heads % shards == 0 and (splits_kv or shards % kv_heads == 0)
    q_spec = PartitionSpec(row_axes, None, "tensor" if splits and shards > 1 else None)
    kv_spec = q_spec if splits_kv else PartitionSpec(row_axes)

    def one_device(q, k, v, rows):
        if splits and not splits_kv:
            which = jax.lax.axis_index("tensor") * kv_heads // shards
            k, v = (jax.lax.dynamic_slice_in_dim(x, which, 1, axis=2) for x in (k, v))
        return kernel(q, k, v, rows)

    in_specs = (q_spec, kv_spec, kv_spec, PartitionSpec(row_axes))
    # (The kernels say nothing about how what they return varies over the mesh: check_vma cannot pass.)
    return jax.shard_map(one_device, in_specs=in_specs, out_specs=q_spec, check_vma=False)(q_BTNH, k_BSKH, v_BSKH, rows)
