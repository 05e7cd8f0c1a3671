"""The Elman recurrent language model, a sibling of the decoder behind the same interface: state instead of a cache.

    h_t = f(W_xh x_t + W_hh h_{t-1} + b_h),   y_t = W_hy h_t + b_y          (Elman 1990; f tanh or relu)

Padding on the left leaves the state at its start, zero: what a padding column adds is masked to 0, and f(0) = 0.

Dimensions: B batch, T time, D width of the state, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Remat
from diptych.families.recurrent import RecurrentConfig
from diptych_jax.adapter import Adapter
from diptych_jax.kernels import Kernel
from diptych_jax.mesh import constrain
from diptych_jax.model import LanguageModel, Parameters, Reading, Unembed, product
from diptych_jax.products import project
from diptych_jax.taps import over_layers, tap

LAYER_SLOTS = ("input", "recurrent", "recurrent_bias")
TOP_SLOTS = ("embedding", "head", "head_bias", "score")
State = Float[Array, "B L D"]


class RecurrentLayers(Parameters):
    """The layers' parameters, stacked on a leading axis."""

    def __init__(self, values: Mapping[str, Array]):
        self.hold(values, LAYER_SLOTS)


class Recurrent(LanguageModel):
    """Embedding, layers, and a head. See `diptych_jax.model.Decoder` for the methods."""

    def __init__(self, config: RecurrentConfig, values: Mapping[str, Array], adapter: Adapter | None = None):
        self.config = config
        self.adapter = adapter
        self.hold(values, TOP_SLOTS)
        self.layers = RecurrentLayers(values)

    def unembedding(self) -> Unembed:
        """Logits of states. Made once before a loop: it brings the table's parts together."""
        table_VE, bias_V = self.top("embedding" if self["head"] is None else "head"), self["head_bias"]

        def unembed(x: Float[Array, "*C E"]) -> Float[Array, "*C V"]:
            logits = product(x, table_VE)
            return logits + bias_V.astype(logits.dtype)

        return unembed

    def read(
        self,
        tokens_BT: Int[Array, "B T"],
        attention_BT: Bool[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        remat: Remat = "full",
        kernel: Kernel = "xla",
    ) -> Reading:
        """The states of the last layer at every column. Of positions only 0 says something: an example begins, and the
        state with it. There is nothing to make again: the states are all that it keeps."""
        del remat, kernel
        start = self.state(tokens_BT.shape[0], 0)
        return Reading(tap("final", self._run(start, tokens_BT, attention_BT, positions_BT)[0]), None)

    def state(self, batch: int, columns: int) -> State:
        """The state before the first token. `columns` is a cache's business."""
        del columns
        zeros_BLD = jnp.zeros((batch, self.config.num_layers, self.config.hidden_size), self.dtype)
        return constrain(zeros_BLD, "rows", None, None)

    def reader(self) -> Callable[..., tuple[Float[Array, "B T D"], State]]:
        """Reads tokens into the state: `diptych_jax.model._extend` without a cache."""

        def extend(state: State, tokens_BT: Array, padding_B: Array, *, column: int | Array, **columns: Any):
            del columns
            queries_BT = jnp.reshape(column, (-1, 1)) + jnp.arange(tokens_BT.shape[1])
            attention_BT = queries_BT >= padding_B[:, None]
            positions_BT = jnp.maximum(queries_BT - padding_B[:, None], 0)
            return self._run(state, tokens_BT, attention_BT, positions_BT)

        return extend

    def _run(
        self,
        state_BLD: State,
        tokens_BT: Int[Array, "B T"],
        attention_BT: Bool[Array, "B T"],
        positions_BT: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], State]:
        """All columns through all layers, from the given state to the one after the last column."""
        function = jnp.tanh if self.config.nonlinearity == "tanh" else jax.nn.relu
        begins_TB = (positions_BT == 0).T

        def layer(x_TBD, scanned):
            parameters, adapter, first_BD = scanned
            parameters = RecurrentLayers(parameters.gathered(self.config, LAYER_SLOTS))
            if adapter is not None:
                parameters = RecurrentLayers(parameters.changed(LAYER_SLOTS, adapter))
            added_TBD = project(x_TBD, parameters["input"]) + parameters["recurrent_bias"]
            added_TBD = tap("input", jnp.where(attention_BT.T[:, :, None], added_TBD, 0), "t b d -> b t d")

            def step(h_BD, column):
                added_BD, begins_B = column
                h_BD = jnp.where(begins_B[:, None], 0, h_BD)
                h_BD = function(added_BD + project(h_BD, parameters["recurrent"]))
                return h_BD, h_BD

            last_BD, h_TBD = jax.lax.scan(step, first_BD, (added_TBD, begins_TB))
            return tap("out", h_TBD, "t b d -> b t d"), last_BD

        x_TBD = constrain(jnp.swapaxes(tap("embed", self.top("embedding")[tokens_BT]), 0, 1), None, "rows", None)
        layers = (self.layers, self.adapter, jnp.swapaxes(state_BLD, 0, 1))
        h_TBD, last_LBD = over_layers(layer, x_TBD, layers, self.config.num_layers)
        return jnp.swapaxes(h_TBD, 0, 1), jnp.swapaxes(last_LBD, 0, 1)
