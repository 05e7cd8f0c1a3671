"""A mixture of experts: every token through its `top_k` experts, as grouped products over tokens sorted by expert.

No capacity, so no token is ever dropped, and a token's result does not depend on its neighbours. On a mesh the experts
are split over `tensor`.

Dimensions: B batch, T time, D model width, X experts, F inner width of an expert, M = B T top_k routed
copies of tokens, N = B T tokens, C the top_k choices of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from diptych.families.decoder import Experts
from diptych_jax.kernels import LANES, LARGEST_BLOCK
from diptych_jax.mesh import ROWS, row_shards
from diptych_jax.taps import tap

MOST_TILES = 2048


class Routing(NamedTuple):
    """What the balance loss needs of a layer: the router's probabilities and its choices, summed over real tokens."""

    probability_sums_X: Float[Array, " X"]
    counts_X: Float[Array, " X"]


def mixture(
    x_BTD: Float[Array, "B T D"],
    attention_BT: Bool[Array, "B T"],
    *,
    router_DX: Float[Array, "D X"],
    gate_XDF: Float[Array, "X D F"],
    up_XDF: Float[Array, "X D F"],
    down_XFD: Float[Array, "X F D"],
    activation: Callable[[Array], Array],
    experts: Experts,
) -> tuple[Float[Array, "B T D"], Routing]:
    """sum over chosen experts e of w_e down_e(activation(gate_e x) * up_e x), and the routing of the real tokens."""
    batch, length, width = x_BTD.shape
    x_ND = x_BTD.reshape(-1, width)
    # Upcast: the router's logits and softmax in at least float32.
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    logits_NX = jnp.einsum("ND,DX->NX", x_ND, router_DX, preferred_element_type=wide)
    logits_NX = tap("router", logits_NX, "(b t) x -> b t x", b=batch)
    probs_NX = jax.nn.softmax(logits_NX, axis=-1)
    weights_NC, chosen_NC = jax.lax.top_k(probs_NX, experts.top_k)
    if experts.normalized:
        weights_NC = weights_NC / jnp.sum(weights_NC, axis=-1, keepdims=True)

    shape = (batch, length, experts.top_k)
    y_BTD = _on_mesh(
        partial(_products, activation=activation),
        x_BTD, weights_NC.reshape(shape), chosen_NC.reshape(shape), gate_XDF, up_XDF, down_XFD,
    )  # fmt: skip

    real_N = attention_BT.reshape(-1).astype(wide)
    hits_NX = jnp.sum(jax.nn.one_hot(chosen_NC, experts.count, dtype=wide), axis=1)
    routing = Routing(
        probability_sums_X=jnp.einsum("N,NX->X", real_N, probs_NX),
        counts_X=jax.lax.stop_gradient(jnp.einsum("N,NX->X", real_N, hits_NX)),
    )
    return y_BTD, routing


def _on_mesh(products: Callable[..., Array], x_BTD, weights_BTC, chosen_BTC, gate_XDF, up_XDF, down_XFD) -> Array:
    """`_products` on the mesh of the traced program: every device takes its rows through its share of the experts, and
    the sums of the shares are added up."""
    arrays = (x_BTD, weights_BTC, chosen_BTC, gate_XDF, up_XDF, down_XFD)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return products(*arrays, first=0)
    # Rows that do not divide (a few prompts at a time) are read by every device.
    rows = tuple(axis for axis in ROWS if axis in mesh.axis_names) if row_shards(len(x_BTD)) > 1 else None

    def share(*parts: Array) -> Array:
        return products(*parts, first=jax.lax.axis_index("tensor") * len(parts[3]))[None]

    # (A Pallas kernel says nothing about how what it returns varies over the mesh: check_vma cannot pass. Without it
    # everything that several devices read gets the sum of their gradients; a sum of the shares in there would make
    # another one of its own gradient.)
    in_specs, out_specs = (P(rows),) * 3 + (P("tensor"),) * 3, P("tensor", rows)
    return jax.lax.reduce_sum(
        jax.shard_map(share, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays), [0]
    )


def _products(x_BTD, weights_BTC, chosen_BTC, gate_XDF, up_XDF, down_XFD, *, first, activation) -> Array:
    """The sum over those chosen experts that are among `first`, first + 1, ...: a token's copies are sorted by expert,
    those for experts elsewhere last, and the grouped products leave these out."""
    count, top_k = len(gate_XDF), chosen_BTC.shape[-1]
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_M = chosen_BTC.reshape(-1) - first
    chosen_M = jnp.where((chosen_M >= 0) & (chosen_M < count), chosen_M, count)
    order_M = jnp.argsort(chosen_M, stable=True)
    source_M = order_M // top_k
    sizes_X = jnp.bincount(chosen_M, length=count + 1)[:count].astype(jnp.int32)
    is_here_M1 = (chosen_M[order_M] < count)[:, None]
    # A product of no group is whatever the platform leaves there: out with it, here from the gradient and below.
    x_MD = jnp.where(is_here_M1, x_ND[source_M], 0)
    gate_MF, up_MF = _grouped(x_MD, gate_XDF, sizes_X), _grouped(x_MD, up_XDF, sizes_X)
    out_MD = _grouped(activation(gate_MF) * up_MF, down_XFD, sizes_X)
    out_MD = jnp.where(is_here_M1, out_MD, 0) * weights_BTC.reshape(-1)[order_M, None].astype(out_MD.dtype)
    return jnp.zeros_like(x_ND).at[source_M].add(out_MD).reshape(x_BTD.shape)


def _ragged(x_MD: Array, w_XDF: Array, sizes_X: Array) -> Array:
    """The first sizes_X[0] rows times w_XDF[0], the next sizes_X[1] times w_XDF[1], ...; undefined for rows beyond."""
    # The TPU's kernel refuses bfloat16 at the engine's "highest", which would take it in one pass anyway.
    precision = jax.lax.Precision.DEFAULT if x_MD.dtype == jnp.bfloat16 else None
    return jax.lax.ragged_dot(x_MD, w_XDF, sizes_X, precision=precision)


# With a kernel of its own for the gradient of the matrices on TPUs: XLA would multiply every row for every expert.
_grouped = jax.custom_vjp(_ragged)


def _grouped_forward(x_MD, w_XDF, sizes_X):
    """The gradient of matrices is what x_MD is kept for, if they have one: frozen ones do not."""
    arrays = x_MD.value, w_XDF.value, sizes_X.value
    return _grouped(*arrays), (arrays[0] if w_XDF.perturbed else None, *arrays[1:])


def _grouped_backward(saved, change_MF):
    x_MD, w_XDF, sizes_X = saved
    shape = jax.ShapeDtypeStruct((len(change_MF), w_XDF.shape[1]), change_MF.dtype)
    (dx_MD,) = jax.linear_transpose(lambda x_MD: _ragged(x_MD, w_XDF, sizes_X), shape)(change_MF)
    if x_MD is None:
        return dx_MD, None, None

    def by_xla(x_MD, change_MF, sizes_X):
        return jax.linear_transpose(lambda w_XDF: _ragged(x_MD, w_XDF, sizes_X), w_XDF)(change_MF)[0]

    arrays = (x_MD, change_MF, sizes_X)
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32):  # the kernel's types
        return dx_MD, by_xla(*arrays), None
    return dx_MD, jax.lax.platform_dependent(*arrays, tpu=by_group, default=by_xla), None


_grouped.defvjp(_grouped_forward, _grouped_backward, symbolic_zeros=True)


def by_group(
    x_MD: Float[Array, "M D"], y_MF: Float[Array, "M F"], sizes_X: Int[Array, " X"], *, interpret: bool = False
) -> Float[Array, "X D F"]:
    """x^T y of the first sizes_X[0] rows, of the next sizes_X[1], ...: a TPU's kernel for bfloat16 and float32, which
    adds up in float32. Zeros for no rows; rows beyond are not read. interpret: run it on any device, for tests."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    # (The kernel finds the tiles of a group by a histogram in float32, which is wrong from some 4,100 tiles on.)
    rows = max(_tile(len(x_MD)), -(-len(x_MD) // (MOST_TILES * LANES)) * LANES)
    x_MD, y_MF = (jnp.pad(x, ((0, -len(x) % rows), (0, 0))) for x in (x_MD, y_MF))
    tiling = (rows, _tile(x_MD.shape[1]), _tile(y_MF.shape[1]))
    # As above: one pass for bfloat16. (The kernel counts its tiles in what it takes to be 32 bits.)
    precision = "default" if x_MD.dtype == jnp.bfloat16 else "highest"
    with jax.default_matmul_precision(precision), jax.enable_x64(False):
        return tgmm(x_MD.T, y_MF, sizes_X, preferred_element_type=x_MD.dtype, tiling=tiling, interpret=interpret)


def _tile(size: int) -> int:
    """Even parts of a size, in whole lanes."""
    return -(-size // (-(-size // LARGEST_BLOCK) * LANES)) * LANES
