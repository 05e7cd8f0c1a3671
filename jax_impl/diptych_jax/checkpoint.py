"""Training state on disk through orbax: weights, moments, step and average, restored bit for bit.

The state is stored as nested dictionaries that end in arrays in the model's own (stacked) layout: a checkpoint is for
going on with the same engine. Weights and optimizer state cross to another engine by Hugging Face names instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as orbax

from diptych.errors import UserError
from diptych_jax.model import Llama
from diptych_jax.optimizer import TrainState, moments_of, with_moments
from diptych_jax.weights import arrays

_FOLDER = "state"


def save(directory: Path, state: TrainState) -> None:
    """Write `state` into `directory`, which exists or not but holds no checkpoint."""
    target = Path(directory).absolute() / _FOLDER
    if target.exists():
        raise UserError(f"{target} exists: a checkpoint goes into an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    orbax.save(str(target), _tree(state))


def load(directory: Path, state: TrainState) -> TrainState:
    """What `save` wrote, in the structure of `state`, which itself is left alone.

    Raises UserError where there is no checkpoint, or one of another model, optimizer or precision.
    """
    source = Path(directory).absolute() / _FOLDER
    if not orbax.is_orbax_checkpoint(str(source)):
        raise UserError(f"{source} is not a checkpoint of the JAX engine: name a folder that it saved")
    wanted = _flat(_tree(state))
    found = _flat(orbax.metadata(str(source)).metadata)
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        raise UserError(f"{source} was saved by another model or optimizer: {', '.join(odd[:3])} not in both")
    for name, array in wanted.items():
        saved = (tuple(found[name].shape), np.dtype(found[name].dtype))
        if saved != (array.shape, array.dtype):
            raise UserError(
                f"{source}: {name} is {saved[1]}{list(saved[0])}, the model has {array.dtype}{list(array.shape)}: "
                "use the checkpoint of the same model and precision"
            )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(state))
    # Copies: the restored buffers are donated to the next update and must belong to nobody else.
    tree = jax.tree.map(lambda x: jnp.array(x, copy=True), orbax.load(str(source), abstract))
    moments = moments_of(state)._replace(
        step=tree["step"],
        first=_filled(state.model, tree["first"]),
        second=_filled(state.model, tree["second"]) if "second" in tree else None,
    )
    ema = _filled(state.model, tree["ema"]) if "ema" in tree else None
    return with_moments(TrainState(_filled(state.model, tree["parameters"]), state.optimizer, ema), moments)


def _tree(state: TrainState) -> dict[str, Any]:
    moments = moments_of(state)
    parts = {"parameters": state.model, "first": moments.first, "second": moments.second, "ema": state.ema}
    held = {part: {slot.attribute: array for slot, array in arrays(model)} for part, model in parts.items() if model}
    return {"step": moments.step, **held}


def _filled(model: Llama, values: dict[str, jax.Array]) -> Llama:
    """A model of the same structure that holds `values` by attribute."""
    leaves, structure = jax.tree.flatten(model)
    attributes = jax.tree.leaves(
        jax.tree_util.tree_map_with_path(lambda path, _: path[-2].name, model), is_leaf=lambda x: isinstance(x, str)
    )
    assert len(leaves) == len(attributes)
    return jax.tree.unflatten(structure, [values[attribute] for attribute in attributes])


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in
            jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
