"""The Llama decoder as flax.nnx modules that hold arrays and nothing else: pytrees under plain `jax.jit`.

The layers are one `DecoderLayer` whose parameters are stacked [layers, ...] and run by `jax.lax.scan`; decoding takes
the same layer apart (`unstacked_layers`) and gives it another `attend`. So there is one definition of a layer for
training, prefill and decoding.

Dimensions: B batch, T time, D model width, N query heads, K key-value heads, H head size, F inner width, V vocabulary,
L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Head
from diptych.weights.llama import LlamaConfig, inverse_frequencies
from diptych_jax.attention import Rotation, attention, rotate, rotation

# (queries, keys, values) -> (what the queries read, anything else the caller wants of this layer: its cache)
Attend = Callable[
    [Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], tuple[Float[Array, "B T N H"], Any]
]


def rms_norm(x_BTD: Float[Array, "B T D"], gain_D: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """gain * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019), the mean over D."""
    # Upcast: the statistics in at least float32.
    wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return gain_D * normed.astype(x_BTD.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated MLP. Parameters are of one layer, or of all layers stacked on a leading axis."""

    def __init__(
        self,
        *,
        attention_norm_D: Array,
        query_DNH: Array,
        key_DKH: Array,
        value_DKH: Array,
        output_NHD: Array,
        mlp_norm_D: Array,
        gate_DF: Array,
        up_DF: Array,
        down_FD: Array,
        eps: float,
    ):
        self.attention_norm_D = nnx.Param(attention_norm_D)
        self.query_DNH = nnx.Param(query_DNH)
        self.key_DKH = nnx.Param(key_DKH)
        self.value_DKH = nnx.Param(value_DKH)
        self.output_NHD = nnx.Param(output_NHD)
        self.mlp_norm_D = nnx.Param(mlp_norm_D)
        self.gate_DF = nnx.Param(gate_DF)
        self.up_DF = nnx.Param(up_DF)
        self.down_FD = nnx.Param(down_FD)
        self.eps = eps

    def __call__(
        self, x_BTD: Float[Array, "B T D"], angles: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's output, and whatever `attend` returned beside it."""
        normed_BTD = rms_norm(x_BTD, self.attention_norm_D[...], self.eps)
        q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", normed_BTD, self.query_DNH[...]), angles)
        k_BTKH = rotate(jnp.einsum("BTD,DKH->BTKH", normed_BTD, self.key_DKH[...]), angles)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", normed_BTD, self.value_DKH[...])
        read_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", read_BTNH, self.output_NHD[...])

        normed_BTD = rms_norm(x_BTD, self.mlp_norm_D[...], self.eps)
        gate_BTF = jnp.einsum("BTD,DF->BTF", normed_BTD, self.gate_DF[...])
        up_BTF = jnp.einsum("BTD,DF->BTF", normed_BTD, self.up_DF[...])
        inner_BTF = gate_BTF * jax.nn.sigmoid(gate_BTF) * up_BTF
        return x_BTD + jnp.einsum("BTF,FD->BTD", inner_BTF, self.down_FD[...]), cache


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm, and a head: `head_VD` (untied), `score_1D` (scalar) or none (tied)."""

    def __init__(
        self,
        *,
        config: LlamaConfig,
        embedding_VD: Array,
        layers: DecoderLayer,
        norm_D: Array,
        head_VD: Array | None = None,
        score_1D: Array | None = None,
    ):
        self.config = config
        self.embedding_VD = nnx.Param(embedding_VD)
        self.layers = layers
        self.norm_D = nnx.Param(norm_D)
        self.head_VD = None if head_VD is None else nnx.Param(head_VD)
        self.score_1D = None if score_1D is None else nnx.Param(score_1D)

    @property
    def head(self) -> Head:
        return "lm" if self.score_1D is None else "scalar"

    @property
    def unembedding_VD(self) -> Float[Array, "V D"]:
        """The output projection; the embedding itself where they are tied."""
        return self.embedding_VD[...] if self.head_VD is None else self.head_VD[...]

    def angles(self, positions_BT: Int[Array, "B T"]) -> Rotation:
        """Rotary cosines and sines at `positions_BT`."""
        return rotation(positions_BT, inverse_frequencies(self.config), self.embedding_VD[...].dtype)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding; token ids are checked on the host, since JAX would clamp a wrong one silently."""
        return self.embedding_VD[...][tokens_BT]

    def final_norm(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, self.norm_D[...], self.config.rms_norm_eps)

    def unstacked_layers(self) -> list[DecoderLayer]:
        """The layers one by one."""
        return [jax.tree.map(operator.itemgetter(index), self.layers) for index in range(self.config.num_layers)]


def hidden_states(
    model: Llama,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    keep_cache: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """The final, normed hidden states, and with `keep_cache` the keys and values (each [L, B, T, K, H]) of all layers.

    Column t attends to the real columns up to t. Columns outside `attention_BT` hold finite numbers without meaning.
    """
    num_columns = tokens_BT.shape[1]
    causal_TT = jnp.tril(jnp.ones((num_columns, num_columns), bool))
    mask_BTS = causal_TT[None] & attention_BT[:, None, :]
    angles = model.angles(positions_BT)

    def attend(q_BTNH, k_BTKH, v_BTKH):
        return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS), (k_BTKH, v_BTKH) if keep_cache else None

    def body(x_BTD, layer: DecoderLayer):
        return layer(x_BTD, angles, attend)

    # The backward pass makes a layer's activations again from its input. It keeps a third of the memory, and on a CPU
    # takes four fifths of the time that writing and reading them takes. (Inside a scan nothing can be merged across the
    # two passes, so the barriers of prevent_cse are not needed.)
    body = jax.checkpoint(body, prevent_cse=False)
    x_BTD, cache = jax.lax.scan(body, model.embed(tokens_BT), model.layers)
    return model.final_norm(x_BTD), cache


def scores(
    model: Llama, tokens_BT: Int[Array, "B T"], attention_BT: Bool[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The scalar head after each token, in at least float32."""
    if model.score_1D is None:
        raise ValueError("this model has an lm head: it has no scores")
    x_BTD, _ = hidden_states(model, tokens_BT, attention_BT, positions_BT)
    # Upcast: scores in at least float32.
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    return jnp.einsum("BTD,D->BT", x_BTD, model.score_1D[...][0], preferred_element_type=wide)
