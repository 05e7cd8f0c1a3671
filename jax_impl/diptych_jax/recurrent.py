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
from diptych_jax.model import LanguageModel, Parameters, Reading

LAYER_SLOTS = ("input", "recurrent", "recurrent_bias")
TOP_SLOTS = ("embedding", "head", "head_bias", "score")
State = Float[Array, "L B D"]


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

    def unembed(self, x_CE: Float[Array, "C E"]) -> Float[Array, "C V"]:
        """Logits, in at least float32."""
        table_VE = self["embedding"] if self["head"] is None else self["head"]
        # Upcast: logits leave the matrix product in at least float32, before temperature and log-softmax.
        wide = jnp.promote_types(x_CE.dtype, jnp.float32)
        logits_CV = jnp.einsum("CE,VE->CV", x_CE, table_VE, preferred_element_type=wide)
        return logits_CV + self["head_bias"].astype(wide)

    def read(
        self,
        tokens_BT: Int[Array, "B T"],
        attention_BT: Bool[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        remat: Remat = "full",
    ) -> Reading:
        """The states of the last layer at every column. Positions say nothing to a recurrent model, and there is
        nothing to make again: the states are all that it keeps."""
        del positions_BT, remat
        start = self.state(tokens_BT.shape[0], 0)
        return Reading(self._run(start, tokens_BT, attention_BT)[0], None)

    def state(self, batch: int, columns: int) -> State:
        """The state before the first token. `columns` is a cache's business."""
        del columns
        return jnp.zeros((self.config.num_layers, batch, self.config.hidden_size), self.dtype)

    def reader(self) -> Callable[..., tuple[Float[Array, "B T D"], State]]:
        """Reads tokens into the state: `diptych_jax.model._extend` without columns."""

        def extend(state: State, tokens_BT: Array, attention_BT: Array, positions_BT: Array, **columns: Any):
            del positions_BT, columns
            return self._run(state, tokens_BT, attention_BT)

        return extend

    def _run(
        self, state_LBD: State, tokens_BT: Int[Array, "B T"], attention_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], State]:
        """All columns through all layers, from the given state to the one after the last column."""
        function = jnp.tanh if self.config.nonlinearity == "tanh" else jax.nn.relu

        def layer(x_TBD, scanned):
            parameters, adapter, first_BD = scanned
            if adapter is not None:
                parameters = RecurrentLayers(parameters.changed(LAYER_SLOTS, adapter))
            added_TBD = jnp.einsum("TBI,ID->TBD", x_TBD, parameters["input"]) + parameters["recurrent_bias"]
            added_TBD = jnp.where(attention_BT.T[:, :, None], added_TBD, 0)

            def step(h_BD, added_BD):
                h_BD = function(added_BD + jnp.einsum("BI,ID->BD", h_BD, parameters["recurrent"]))
                return h_BD, h_BD

            last_BD, h_TBD = jax.lax.scan(step, first_BD, added_TBD)
            return h_TBD, last_BD

        x_TBD = jnp.swapaxes(self["embedding"][tokens_BT], 0, 1)
        h_TBD, last_LBD = jax.lax.scan(layer, x_TBD, (self.layers, self.adapter, state_LBD))
        return jnp.swapaxes(h_TBD, 0, 1), last_LBD
