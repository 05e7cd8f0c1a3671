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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Head, Remat
from diptych.families.decoder import GELU_SCALES, Activation, DecoderConfig, Norm, alibi_slopes
from diptych.families.family import ModelConfig, model_slots
from diptych_jax.adapter import Adapter
from diptych_jax.attention import Rotation, attention, rotate, rotation, segment_ids, self_attention
from diptych_jax.experts import Routing, mixture
from diptych_jax.kernels import Kernel
from diptych_jax.mesh import constrain, gathered
from diptych_jax.products import project
from diptych_jax.taps import over_layers, tap

# (queries, keys, values, what the caller gave the layer as its window) -> (what the queries read, and whatever else the
# caller wants of this layer: its cache)
Attend = Callable[[Array, Array, Array, Array | int | None], tuple[Float[Array, "B T N H"], Any]]
Cache = list[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]]  # keys and values of each layer
Unembed = Callable[[Array], Array]  # states [..., E] -> logits [..., V], in at least float32
# What `jax.checkpoint` may keep of a layer.
POLICIES = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_saveable}


class Reading(NamedTuple):
    """What a model makes of tokens: hidden states after the last norm, and how its experts were used, if it has any."""

    hidden_BTE: Float[Array, "B T E"]
    routing: Routing | None


# Made again in the backward pass from its inputs, which are there anyway: cheaper than to keep what is in between.
again = partial(jax.checkpoint, prevent_cse=False)


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

    def gathered(self, config: ModelConfig, names: tuple[str, ...]) -> dict[str, Array]:
        """The arrays of these slots, of one layer, whole along fsdp."""
        table = model_slots(config, "lm") | model_slots(config, "scalar")
        return {name: gathered(self[name], table[name]) for name in names if self[name] is not None}

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
        if block == "post":  # the layer's output, a tap of another name
            x_BTD = normalize(x_BTD, self["mlp_norm"], self["mlp_norm_bias"], self.config.norm)
        return x_BTD, cache, routing

    def adapted(self, adapter: Adapter | None) -> DecoderLayer:
        """The layer as it runs: whole along fsdp, an adapter's changes added to its weights."""
        layer = DecoderLayer(self.config, self.gathered(self.config, LAYER_SLOTS))
        return layer if adapter is None else DecoderLayer(self.config, layer.changed(LAYER_SLOTS, adapter))

    def norm(self, name: str, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        normed = again(partial(normalize, norm=self.config.norm))
        return tap(name, normed(x_BTD, self[name], self[f"{name}_bias"]))

    def attention(
        self, x_BTD: Float[Array, "B T D"], angles: Rotation | None, window: Array | int | None, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        q_BTNH = tap("query", add(project(x_BTD, self["query"]), self["query_bias"]))
        k_BTKH = tap("key", add(project(x_BTD, self["key"]), self["key_bias"]))
        v_BTKH = tap("value", add(project(x_BTD, self["value"]), self["value_bias"]))
        if self.config.qk_norm is not None:
            q_BTNH = tap("query_norm", normalize(q_BTNH, self["query_norm"], None, self.config.norm))
            k_BTKH = tap("key_norm", normalize(k_BTKH, self["key_norm"], None, self.config.norm))
        if angles is not None:
            q_BTNH, k_BTKH = tap("query_rotated", rotate(q_BTNH, angles)), tap("key_rotated", rotate(k_BTKH, angles))
        q_BTNH, k_BTKH, v_BTKH = (constrain(part, "rows", None, "tensor", None) for part in (q_BTNH, k_BTKH, v_BTKH))
        read_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, window)
        read_BTNH = tap("attention", constrain(read_BTNH, "rows", None, "tensor", None))
        return tap("output", add(project(read_BTNH, self["output"], axes=2), self["output_bias"])), cache

    def mlp(
        self, x_BTD: Float[Array, "B T D"], attention_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        act = partial(activate, self.config.activation)
        if self.config.experts is not None:
            y_BTD, routing = mixture(
                x_BTD,
                attention_BT,
                router_DX=self["router"],
                gate_XDF=self["gate"],
                up_XDF=self["up"],
                down_XFD=self["down"],
                activation=act,
                experts=self.config.experts,
            )
            return tap("down", y_BTD), routing
        up_BTF = tap("up", add(project(x_BTD, self["up"]), self["up_bias"]))
        if self.config.gated:
            inner_BTF = again(lambda gate, up: act(gate) * up)(tap("gate", project(x_BTD, self["gate"])), up_BTF)
        else:
            inner_BTF = again(act)(up_BTF)
        inner_BTF = tap("inner", constrain(inner_BTF, "rows", None, "tensor"))
        return tap("down", add(project(inner_BTF, self["down"]), self["down_bias"])), None


def product(x: Float[Array, "*C E"], table_VE: Float[Array, "V E"]) -> Float[Array, "*C V"]:
    """Logits before bias and cap. Upcast: they leave the matrix product in at least float32, before temperature and
    log-softmax."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("...E,VE->...V", x, table_VE, preferred_element_type=wide)
    return constrain(logits, "rows", *(None,) * (x.ndim - 2), "tensor")


def add(x: Float[Array, "..."], bias: Float[Array, "..."] | None) -> Float[Array, "..."]:
    return x if bias is None else x + bias


class LanguageModel(Parameters):
    """What every model is: embeddings, layers stacked on a leading axis, and a head: `head` (untied), `score` (scalar)
    or none (tied)."""

    config: Any
    layers: Parameters

    def top(self, name: str) -> Any:
        """The array of a slot that is not per layer, whole along fsdp; None where the model has no such slot."""
        table = model_slots(self.config, self.head_kind)
        return gathered(self[name], table[name]) if name in table else None

    @property
    def head_kind(self) -> Head:
        return "lm" if getattr(self, "score", None) is None else "scalar"

    @property
    def dtype(self) -> Any:
        return self["embedding"].dtype

    def arrays(self) -> dict[str, Array]:
        """Every slot's array, by name."""
        table = model_slots(self.config, self.head_kind)
        return {name: (self.layers if slot.per_layer else self)[name] for name, slot in table.items()}


class Decoder(LanguageModel):
    """Attention and MLP layers between embeddings, final norm and head."""

    layers: Any  # a DecoderLayer whose parameters are stacked, or (decoding) a list of one for each layer

    def __init__(
        self,
        config: DecoderConfig,
        values: Mapping[str, Array],
        adapter: Adapter | None = None,
        *,
        layers: Sequence[Mapping[str, Array]] | None = None,
    ):
        """values: every slot of the model; those of layers stacked on a leading axis, or given one by one, `layers`."""
        self.config = config
        self.adapter = adapter
        self.hold(values, TOP_SLOTS)
        if layers is None:
            self.layers = DecoderLayer(config, {name: value for name, value in values.items() if name in LAYER_SLOTS})
        else:
            self.layers = nnx.List([DecoderLayer(config, layer) for layer in layers])

    def embed(self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings as the first layer reads them; token ids are checked on the host, since JAX would clamp a wrong
        one silently."""
        config = self.config
        # The constraint is for the gradient: summed whole along fsdp, then split; the rows it sums over are split too.
        table_VE = constrain(self.top("embedding"), "tensor", None)
        x_BTD = constrain(table_VE[tokens_BT], "rows", None, None) * config.embedding_scale
        if self["project_in"] is not None:
            x_BTD = project(x_BTD, self.top("project_in"))
        if config.position_offset is not None:
            x_BTD = x_BTD + self.top("positions")[positions_BT + config.position_offset]
        if config.embedding_norm:
            x_BTD = normalize(x_BTD, self["embedding_norm"], self["embedding_norm_bias"], config.norm)
        return tap("embed", constrain(x_BTD, "rows", None, None))

    def finish(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """The last norm and projection: what a head reads."""
        if self.config.final_norm:
            x_BTD = normalize(x_BTD, self["final_norm"], self["final_norm_bias"], self.config.norm)
        if self["project_out"] is not None:
            x_BTD = project(x_BTD, self.top("project_out"))
        return tap("final", x_BTD)

    def unembedding(self) -> Unembed:
        """Logits of states. Made once before a loop: it brings the table's parts together."""
        table_VE, cap = self.top("embedding" if self["head"] is None else "head"), self.config.logit_softcap

        def unembed(x: Float[Array, "*C E"]) -> Float[Array, "*C V"]:
            logits = product(x, table_VE)
            return logits if cap is None else cap * jnp.tanh(logits / cap)

        return unembed

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
        kernel: Kernel = "xla",
    ) -> Reading:
        """The training forward. Column t attends to the columns of its own example up to t, within its window; an
        example begins where a position is 0.

        Columns outside `attention_BT` hold finite numbers without meaning.
        """
        config = self.config
        # What differs between layers is scanned with them: which of the windows, and which of two rotations.
        windows = tuple(dict.fromkeys(config.windows))
        windows_L = jnp.asarray([windows.index(window) for window in config.windows]) if len(windows) > 1 else None
        read = self_attention(
            segment_ids(attention_BT, positions_BT),
            windows=windows,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            bias_BNTS=self.bias(positions_BT, positions_BT),
            kernel=kernel,
        )

        def attend(q_BTNH, k_BTKH, v_BTKH, window):
            return read(q_BTNH, k_BTKH, v_BTKH, window), None

        made = [rotation(positions_BT, rope, self.dtype) for rope in config.ropes]
        which_L = jnp.asarray(config.rope_of_layer) if len(made) > 1 else None
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *made) if len(made) > 1 else None

        def body(x_BTD, scanned):
            layer, adapter, window, which = scanned
            angles = made[0] if made else None
            if which is not None:
                angles = jax.tree.map(lambda part: part[which], stacked)
            x_BTD, _, routing = layer.adapted(adapter)(x_BTD, angles, window, attend, attention_BT)
            return tap("out", constrain(x_BTD, "rows", None, None)), routing

        # "full": the backward pass makes a layer's activations again from its input. It keeps a third of the memory,
        # and on a CPU takes four fifths of the time that writing and reading them takes. (Inside a scan nothing can be
        # merged across the two passes, so the barriers of prevent_cse are not needed.)
        if remat != "none":
            body = jax.checkpoint(body, prevent_cse=False, policy=POLICIES[remat])
        layers = (self.layers, self.adapter, windows_L, which_L)
        x_BTD, routing = over_layers(body, self.embed(tokens_BT, positions_BT), layers, config.num_layers)
        if routing is not None:
            routing = Routing(*(jnp.sum(part, axis=0) for part in routing))
        return Reading(self.finish(x_BTD), routing)

    def state(self, batch: int, columns: int) -> Cache:
        """An empty cache of `columns` columns. Heads come before columns: a step's products then read it as it lies."""
        shape = (batch, self.config.num_kv_heads, columns, self.config.head_dim)
        return [
            (_laid(jnp.zeros(shape, self.dtype)), _laid(jnp.zeros(shape, self.dtype)))
            for _ in range(self.config.num_layers)
        ]

    def reader(self) -> Callable[..., tuple[Float[Array, "B T E"], Cache]]:
        """`Extend`: reads tokens into a cache. Made once before a loop: it takes the layers apart, unless they are."""
        if isinstance(self.layers, nnx.List):  # a decode copy (`switch`): an adapter is merged
            return partial(_extend, self, list(self.layers))
        apart = [
            jax.tree.map(operator.itemgetter(index), (self.layers, self.adapter))
            for index in range(self.config.num_layers)
        ]
        return partial(_extend, self, [layer.adapted(adapter) for layer, adapter in apart])


def _attention(config: DecoderConfig, q, k, v, mask_BTS, bias_BNTS) -> Float[Array, "B T N H"]:
    return attention(
        q, k, v, mask_BTS, scale=config.attention_scale, softcap=config.attention_softcap, bias_BNTS=bias_BNTS
    )


def _laid(cache_BKSH: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
    return constrain(cache_BKSH, "rows", "tensor", None, None)


def _written(
    cache_BKSH: Float[Array, "B K S H"], new_BTKH: Float[Array, "B T K H"], column: int | Array
) -> Float[Array, "B K S H"]:
    """The cache with T columns from `column` on replaced: one for all rows, or each row's own [B]."""
    new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
    if jnp.ndim(column) == 0:
        return _laid(jax.lax.dynamic_update_slice_in_dim(cache_BKSH, new_BKTH, column, axis=2))
    each = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    return _laid(each(cache_BKSH, new_BKTH, column))


def _extend(
    model: Decoder,
    layers: list[DecoderLayer],
    state: Cache,
    tokens_BT: Int[Array, "B T"],
    padding_B: Int[Array, " B"],
    *,
    column: int | Array,
    ends: tuple[int, ...],
    which: int | Array = 0,
) -> tuple[Float[Array, "B T E"], Cache]:
    """Read T more tokens of every row into columns column .. column + T - 1 of the cache; their hidden states.

    padding_B: columns before a row's first token; all later ones up to the present are real. column: of all rows, or
    [B]. Only the first `ends[which]` columns are read: they must hold every column that matters.
    """
    config = model.config
    queries_BT = jnp.reshape(column, (-1, 1)) + jnp.arange(tokens_BT.shape[1])  # one row where `column` is of all
    keys_S = jnp.arange(ends[-1])
    distance_BTS = queries_BT[..., None] - keys_S
    mask_BTS = (distance_BTS >= 0) & (keys_S >= padding_B[:, None, None])
    positions_BT = jnp.maximum(queries_BT - padding_B[:, None], 0)
    attention_BT = queries_BT >= padding_B[:, None]
    bias_BNTS = model.bias(positions_BT, jnp.maximum(keys_S - padding_B[:, None], 0))
    x_BTD = model.embed(tokens_BT, positions_BT)
    new_state: Cache = []
    for layer, angles, window, (keys_BKSH, values_BKSH) in zip(
        layers, model.angles(positions_BT), config.windows, state, strict=True
    ):

        def attend(q_BTNH, k_BTKH, v_BTKH, window, keys_BKSH=keys_BKSH, values_BKSH=values_BKSH):
            keys_BKSH = _written(keys_BKSH, k_BTKH, column)
            values_BKSH = _written(values_BKSH, v_BTKH, column)
            seen_BTS = mask_BTS if window is None else mask_BTS & (distance_BTS < window)

            def read(end: int) -> Array:
                k_BSKH, v_BSKH = (jnp.swapaxes(part[:, :, :end], 1, 2) for part in (keys_BKSH, values_BKSH))
                bias = None if bias_BNTS is None else bias_BNTS[..., :end]
                return _attention(config, q_BTNH, k_BSKH, v_BSKH, seen_BTS[..., :end], bias)

            if len(ends) == 1:
                return read(ends[0]), (keys_BKSH, values_BKSH)
            return jax.lax.switch(which, [partial(read, end) for end in ends]), (keys_BKSH, values_BKSH)

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
    kernel: Kernel = "xla",
) -> tuple[Float[Array, "B T"], Routing | None]:
    """The scalar head after each token, in at least float32, and the routing."""
    if model.head_kind != "scalar":
        raise ValueError("this model has an lm head: it has no scores")
    hidden_BTE, routing = model.read(tokens_BT, attention_BT, positions_BT, remat, kernel)
    # Upcast: scores in at least float32.
    wide = jnp.promote_types(hidden_BTE.dtype, jnp.float32)
    scores_BT = jnp.einsum("BTE,E->BT", hidden_BTE, model.top("score")[0], preferred_element_type=wide)
    return tap("scores", scores_BT), routing
