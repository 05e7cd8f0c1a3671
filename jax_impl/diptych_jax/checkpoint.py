"""Training state on disk through orbax: weights, moments, step and average, restored bit for bit.

The state of the trained part (all, or an adapter) is stored as nested dictionaries that end in arrays in the model's
own (stacked) layout: a checkpoint is for going on with the same engine, on any mesh and any number of processes. Every
process writes the parts that its devices hold, and reads the parts that they shall hold. Weights and optimizer state
cross to another engine by Hugging Face names instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as orbax

from diptych.errors import UserError
from diptych_jax.optimizer import TrainState, moments_of, with_moments
from diptych_jax.weights import Model, by_slot

_FOLDER = "state"


def save(directory: Path, state: TrainState) -> Callable[[], None]:
    """Write `state` into `directory`, which exists or not but holds no checkpoint; in every process.

    Returns once the state is copied to the host and may change again. Call what is returned to wait until all of it is
    on disk; before that there is no checkpoint. It raises what went wrong in writing.
    """
    target = Path(directory).absolute() / _FOLDER
    if target.exists():
        raise UserError(f"{target} exists: a checkpoint goes into an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return orbax.save_async(str(target), _tree(state)).result


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

    def filled(part: str) -> Any:
        return by_slot(lambda name, _: tree[part][name], state.model) if part in tree else None

    moments = moments_of(state)._replace(step=tree["step"], first=filled("first"), second=filled("second"))
    return with_moments(TrainState(filled("parameters"), state.optimizer, filled("ema")), moments)


def _tree(state: TrainState) -> dict[str, Any]:
    moments = moments_of(state)
    parts = {"parameters": state.model, "first": moments.first, "second": moments.second, "ema": state.ema}
    return {"step": moments.step} | {part: _arrays(model) for part, model in parts.items() if model is not None}


def _arrays(model: Model) -> dict[str, jax.Array]:
    """The arrays of the trained part, by slot."""
    found: dict[str, jax.Array] = {}
    by_slot(found.setdefault, model)
    return found


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in
            jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
