"""The decoder as flax.nnx modules that hold arrays and nothing else: pytrees under plain `jax.jit`.

One configurable decoder serves every family (`diptych.families`); its parameters are the slots of
`diptych.families.decoder`. The layers are one `DecoderLayer` whose parameters are stacked [layers, ...] and run by
`jax.lax.scan`; decoding takes the same layer apart (`Decoder.reader`) and gives it another `attend`. So there is one
definition of a layer for training, prefill and decoding. `recurrent.py` is its sibling behind the same interface.

Dimensions: B batch, T time, S columns of a cache, D model width, E embedding width, N query heads, K key-value heads, H
head size, F inner width, V vocabulary, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Head, Remat
from diptych.families.decoder import GELU_SCALES, Activation, DecoderConfig, Norm, alibi_slopes
from diptych.families.family import model_slots
from diptych_jax.adapter import Adapter
from diptych_jax.attention import Rotation, attention, rotate, rotation
from diptych_jax.experts import Routing, mixture

# (queries, keys, values, window) -> (what the queries read, anything else the caller wants of this layer: its cache)
Attend = Callable[[Array, Array, Array, Array | int | None], tuple[Float[Array, "B T N H"], Any]]
Cache = list[tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]  # keys and values of each layer
UNLIMITED = 2**30  # a window that no sequence fills
# What `jax.checkpoint` may keep of a layer.
POLICIES = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_saveable}


class Reading(NamedTuple):
    """What a model makes of tokens: hidden states after the last norm, and how its experts were used, if it has any."""

    hidden_BTE: Float[Array, "B T E"]
    routing: Routing | None


def activate(kind: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation, every constant named."""
    match kind:
        case "silu":
            return x * jax.nn.sigmoid(x)
        case "relu":
            return jax.nn.relu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case _:
            return 0.5 * x * (1 + jnp.tanh(GELU_SCALES[kind] * (x + 0.044715 * x * x * x)))


def normalize(
    x: Float[Array, "..."], gain: Float[Array, "..."], bias: Float[Array, "..."] | None, norm: Norm
) -> Float[Array, "..."]:
    """`Norm` over the axes of `gain`, the last ones of `x`."""
    axes = tuple(range(-gain.ndim, 0))
    # Upcast: the statistics in at least float32.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if norm.kind == "layer":
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + norm.eps)
    if norm.offset:  # Gemma multiplies before it rounds
        return (normed * (gain.astype(wide.dtype) + norm.offset)).astype(x.dtype)
    scaled = gain * normed.astype(x.dtype)
    return scaled if bias is None else scaled + bias


class Parameters(nnx.Module):
    """An attribute for each slot that the model has; None for those that it does not."""

    def hold(self, values: Mapping[str, Array], names: tuple[str, ...]) -> None:
        for name in names:
            setattr(self, name, nnx.Param(values[name]) if name in values else None)

    def __getitem__(self, name: str) -> Any:
        """The array of a slot, None where the model has no such slot."""
        parameter = getattr(self, name)
        return None if parameter is None else parameter[...]

    def changed(self, names: tuple[str, ...], adapter: Adapter) -> dict[str, Array]:
        """The arrays of these slots with an adapter's changes added."""
        held = {name: self[name] for name in names if self[name] is not None}
        return held | {name: held[name] + change for name, change in adapter.changes().items()}


LAYER_SLOTS = (
    "attention_norm", "attention_norm_bias", "query", "query_bias", "key", "key_bias", "value", "value_bias",
    "query_norm", "key_norm", "output", "output_bias", "attention_out_norm", "attention_out_norm_bias", "mlp_norm",
    "mlp_norm_bias", "router", "gate", "up", "up_bias", "down", "down_bias", "mlp_out_norm", "mlp_out_norm_bias",
)  # fmt: skip
TOP_SLOTS = (
    "embedding", "positions", "project_in", "embedding_norm", "embedding_norm_bias", "final_norm", "final_norm_bias",
    "project_out", "head", "score",
)  # fmt: skip


class DecoderLayer(Parameters):
    """Attention and MLP. Parameters are of one layer, or of all layers stacked on a leading axis."""

    def __init__(self, config: DecoderConfig, values: Mapping[str, Array]):
        self.config = config
        self.hold(values, LAYER_SLOTS)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Rotation | None,
        window: Array | int | None,
        attend: Attend,
        attention_BT: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """The layer's output, whatever `attend` returned beside it, and the routing of its experts."""
        block = self.config.block
        if block == "parallel":
            read_BTD, cache = self.attention(self.norm("attention_norm", x_BTD), angles, window, attend)
            inner_BTD, routing = self.mlp(self.norm("mlp_norm", x_BTD), attention_BT)
            return x_BTD + read_BTD + inner_BTD, cache, routing
        before, after = block in ("pre", "sandwich"), block in ("output", "sandwich")

        read_BTD, cache = self.attention(
            self.norm("attention_norm", x_BTD) if before else x_BTD, angles, window, attend
        )
        x_BTD = x_BTD + (self.norm("attention_out_norm", read_BTD) if after else read_BTD)
        if block == "post":
            x_BTD = self.norm("attention_norm", x_BTD)
        inner_BTD, routing = self.mlp(self.norm("mlp_norm", x_BTD) if before else x_BTD, attention_BT)
        x_BTD = x_BTD + (self.norm("mlp_out_norm", inner_BTD) if after else inner_BTD)
        if block == "post":
            x_BTD = self.norm("mlp_norm", x_BTD)
        return x_BTD, cache, routing

    def adapted(self, adapter: Adapter | None) -> DecoderLayer:
        """The layer with an adapter's changes added to its weights."""
        return self if adapter is None else DecoderLayer(self.config, self.changed(LAYER_SLOTS, adapter))

    def norm(self, name: str, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return normalize(x_BTD, self[name], self[f"{name}_bias"], self.config.norm)

    def attention(
        self, x_BTD: Float[Array, "B T D"], angles: Rotation | None, window: Array | int | None, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        q_BTNH = add(jnp.einsum("BTD,DNH->BTNH", x_BTD, self["query"]), self["query_bias"])
        k_BTKH = add(jnp.einsum("BTD,DKH->BTKH", x_BTD, self["key"]), self["key_bias"])
        v_BTKH = add(jnp.einsum("BTD,DKH->BTKH", x_BTD, self["value"]), self["value_bias"])
        if self.config.qk_norm is not None:
            q_BTNH = normalize(q_BTNH, self["query_norm"], None, self.config.norm)
            k_BTKH = normalize(k_BTKH, self["key_norm"], None, self.config.norm)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        read_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, window)
        return add(jnp.einsum("BTNH,NHD->BTD", read_BTNH, self["output"]), self["output_bias"]), cache

    def mlp(
        self, x_BTD: Float[Array, "B T D"], attention_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        act = partial(activate, self.config.activation)
        if self.config.experts is not None:
            return mixture(
                x_BTD,
                attention_BT,
                router_DX=self["router"],
                gate_XDF=self["gate"],
                up_XDF=self["up"],
                down_XFD=self["down"],
                activation=act,
                experts=self.config.experts,
            )
        up_BTF = add(jnp.einsum("BTD,DF->BTF", x_BTD, self["up"]), self["up_bias"])
        inner_BTF = act(jnp.einsum("BTD,DF->BTF", x_BTD, self["gate"])) * up_BTF if self.config.gated else act(up_BTF)
        return add(jnp.einsum("BTF,FD->BTD", inner_BTF, self["down"]), self["down_bias"]), None


def add(x: Float[Array, "..."], bias: Float[Array, "..."] | None) -> Float[Array, "..."]:
    return x if bias is None else x + bias


class LanguageModel(Parameters):
    """What every model is: embeddings, layers stacked on a leading axis, and a head: `head` (untied), `score` (scalar)
    or none (tied)."""

    config: Any
    layers: Parameters

    @property
    def head_kind(self) -> Head:
        return "lm" if self["score"] is None else "scalar"

    @property
    def dtype(self) -> Any:
        return self["embedding"].dtype

    def arrays(self) -> dict[str, Array]:
        """Every slot's array, by name."""
        table = model_slots(self.config, self.head_kind)
        return {name: (self.layers if slot.per_layer else self)[name] for name, slot in table.items()}


class Decoder(LanguageModel):
    """Attention and MLP layers between embeddings, final norm and head."""

    def __init__(self, config: DecoderConfig, values: Mapping[str, Array], adapter: Adapter | None = None):
        """values: every slot of the model; those of layers stacked on a leading axis."""
        self.config = config
        self.adapter = adapter
        self.hold(values, TOP_SLOTS)
        self.layers = DecoderLayer(config, {name: value for name, value in values.items() if name in LAYER_SLOTS})

    def embed(self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings as the first layer reads them; token ids are checked on the host, since JAX would clamp a wrong
        one silently."""
        config = self.config
        x_BTD = self["embedding"][tokens_BT] * config.embedding_scale
        if self["project_in"] is not None:
            x_BTD = jnp.einsum("BTE,ED->BTD", x_BTD, self["project_in"])
        if config.position_offset is not None:
            x_BTD = x_BTD + self["positions"][positions_BT + config.position_offset]
        if config.embedding_norm:
            x_BTD = normalize(x_BTD, self["embedding_norm"], self["embedding_norm_bias"], config.norm)
        return x_BTD

    def finish(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """The last norm and projection: what a head reads."""
        if self.config.final_norm:
            x_BTD = normalize(x_BTD, self["final_norm"], self["final_norm_bias"], self.config.norm)
        return x_BTD if self["project_out"] is None else jnp.einsum("BTD,DE->BTE", x_BTD, self["project_out"])

    def unembed(self, x_CE: Float[Array, "C E"]) -> Float[Array, "C V"]:
        """Logits, in at least float32."""
        table_VE = self["embedding"] if self["head"] is None else self["head"]
        # Upcast: logits leave the matrix product in at least float32, before temperature and log-softmax.
        wide = jnp.promote_types(x_CE.dtype, jnp.float32)
        logits_CV = jnp.einsum("CE,VE->CV", x_CE, table_VE, preferred_element_type=wide)
        cap = self.config.logit_softcap
        return logits_CV if cap is None else cap * jnp.tanh(logits_CV / cap)

    def angles(self, positions_BT: Int[Array, "B T"]) -> list[Rotation | None]:
        """The rotation of each layer."""
        made = [rotation(positions_BT, rope, self.dtype) for rope in self.config.ropes]
        return [made[which] for which in self.config.rope_of_layer] or [None] * self.config.num_layers

    def bias(self, queries_BT: Int[Array, "B T"], keys_BS: Int[Array, "B S"]) -> Float[Array, "B N T S"] | None:
        """ALiBi's bias from the positions of queries and keys: slope (key - query). Softmax only sees differences, and
        this one stays small in float32 where slope x key does not."""
        if not self.config.alibi:
            return None
        distance_BTS = (keys_BS[:, None, :] - queries_BT[:, :, None]).astype(jnp.promote_types(self.dtype, jnp.float32))
        slopes_N = jnp.asarray(alibi_slopes(self.config.num_heads), distance_BTS.dtype)
        return slopes_N[None, :, None, None] * distance_BTS[:, None]

    def read(
        self,
        tokens_BT: Int[Array, "B T"],
        attention_BT: Bool[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        remat: Remat = "full",
    ) -> Reading:
        """The training forward. Column t attends to the real columns up to t, within its window.

        Columns outside `attention_BT` hold finite numbers without meaning.
        """
        config = self.config
        columns = jnp.arange(tokens_BT.shape[1])
        distance_TT = columns[:, None] - columns[None, :]
        mask_BTS = (distance_TT >= 0)[None] & attention_BT[:, None, :]
        bias_BNTS = self.bias(positions_BT, positions_BT)

        def attend(q_BTNH, k_BTKH, v_BTKH, window):
            mask = mask_BTS if window is None else mask_BTS & (distance_TT < window)
            return _attention(config, q_BTNH, k_BTKH, v_BTKH, mask, bias_BNTS), None

        # What differs between layers is scanned with them: the window, and which of two rotations.
        windows_L = None
        if any(window is not None for window in config.windows):
            windows_L = jnp.asarray([UNLIMITED if window is None else window for window in config.windows])
        made = [rotation(positions_BT, rope, self.dtype) for rope in config.ropes]
        which_L = jnp.asarray(config.rope_of_layer) if len(made) > 1 else None
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *made) if len(made) > 1 else None

        def body(x_BTD, scanned):
            layer, adapter, window, which = scanned
            angles = made[0] if made else None
            if which is not None:
                angles = jax.tree.map(lambda part: part[which], stacked)
            x_BTD, _, routing = layer.adapted(adapter)(x_BTD, angles, window, attend, attention_BT)
            return x_BTD, routing

        # "full": the backward pass makes a layer's activations again from its input. It keeps a third of the memory,
        # and on a CPU takes four fifths of the time that writing and reading them takes. (Inside a scan nothing can be
        # merged across the two passes, so the barriers of prevent_cse are not needed.)
        if remat != "none":
            body = jax.checkpoint(body, prevent_cse=False, policy=POLICIES[remat])
        layers = (self.layers, self.adapter, windows_L, which_L)
        x_BTD, routing = jax.lax.scan(body, self.embed(tokens_BT, positions_BT), layers)
        if routing is not None:
            routing = Routing(*(jnp.sum(part, axis=0) for part in routing))
        return Reading(self.finish(x_BTD), routing)

    def state(self, batch: int, columns: int) -> Cache:
        """An empty cache of `columns` columns."""
        shape = (batch, columns, self.config.num_kv_heads, self.config.head_dim)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.config.num_layers)]

    def reader(self) -> Callable[..., tuple[Float[Array, "B T E"], Cache]]:
        """`Extend`: reads tokens into a cache. Made once before a loop: it takes the layers apart."""
        apart = [
            jax.tree.map(operator.itemgetter(index), (self.layers, self.adapter))
            for index in range(self.config.num_layers)
        ]
        return partial(_extend, self, [layer.adapted(adapter) for layer, adapter in apart])


def _attention(config: DecoderConfig, q, k, v, mask_BTS, bias_BNTS) -> Float[Array, "B T N H"]:
    return attention(
        q, k, v, mask_BTS, scale=config.attention_scale, softcap=config.attention_softcap, bias_BNTS=bias_BNTS
    )


def _extend(
    model: Decoder,
    layers: list[DecoderLayer],
    state: Cache,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    column: int | Array,
    attention_BS: Bool[Array, "B S"],
    positions_BS: Int[Array, "B S"],
) -> tuple[Float[Array, "B T E"], Cache]:
    """Read T more tokens of every row into columns column .. column + T - 1 of the cache; their hidden states.

    attention_BS, positions_BS: of all columns of the cache, those still empty included. Where `column` is a Python
    number only the columns before column + T are read.
    """
    config = model.config
    length = tokens_BT.shape[1]
    end = column + length if isinstance(column, int) else attention_BS.shape[1]
    queries_T, keys_S = column + jnp.arange(length), jnp.arange(end)
    distance_TS = queries_T[:, None] - keys_S[None, :]
    mask_BTS = (distance_TS >= 0)[None] & attention_BS[:, None, :end]
    bias_BNTS = model.bias(positions_BT, positions_BS[:, :end])
    x_BTD = model.embed(tokens_BT, positions_BT)
    new_state: Cache = []
    for layer, angles, window, (keys_BSKH, values_BSKH) in zip(
        layers, model.angles(positions_BT), config.windows, state, strict=True
    ):

        def attend(q_BTNH, k_BTKH, v_BTKH, window, keys_BSKH=keys_BSKH, values_BSKH=values_BSKH):
            keys_BSKH = jax.lax.dynamic_update_slice_in_dim(keys_BSKH, k_BTKH, column, axis=1)
            values_BSKH = jax.lax.dynamic_update_slice_in_dim(values_BSKH, v_BTKH, column, axis=1)
            mask = mask_BTS if window is None else mask_BTS & (distance_TS < window)
            read = _attention(config, q_BTNH, keys_BSKH[:, :end], values_BSKH[:, :end], mask, bias_BNTS)
            return read, (keys_BSKH, values_BSKH)

        x_BTD, written, _ = layer(x_BTD, angles, window, attend, attention_BT)
        new_state.append(written)
    return model.finish(x_BTD), new_state


def scores(
    model: Any,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    remat: Remat = "full",
) -> tuple[Float[Array, "B T"], Routing | None]:
    """The scalar head after each token, in at least float32, and the routing."""
    if model.head_kind != "scalar":
        raise ValueError("this model has an lm head: it has no scores")
    hidden_BTE, routing = model.read(tokens_BT, attention_BT, positions_BT, remat)
    # Upcast: scores in at least float32.
    wide = jnp.promote_types(hidden_BTE.dtype, jnp.float32)
    return jnp.einsum("BTE,E->BT", hidden_BTE, model["score"][0], preferred_element_type=wide), routing
