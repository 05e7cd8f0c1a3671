"""Arrays of another trainer, as they come: made NumPy, and refused where they cannot be what they are called.

Every message says where in the recording it is, what is wrong, and what to do about it in the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from diptych.errors import UserError

Array = Any  # torch, JAX, NumPy, or nested lists of numbers
NORMS_AGREE = 1e-2  # relative: the norm that a trainer reports against that of the gradients it hands over


def numpy_of(array: Array) -> np.ndarray:
    """A copy on the host, whatever holds it; bfloat16 and float16 become float32."""
    if hasattr(array, "detach"):  # torch, which has no NumPy type for bfloat16
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() and array.dtype.itemsize == 2 else array).numpy()
    found = np.array(array)
    return found.astype(np.float32) if found.dtype.name in ("bfloat16", "float16") else found


def weights_of(module: Any) -> dict[str, np.ndarray]:
    """A copy of a torch module's parameters, by name: for models of transformers, those of its checkpoint (mixtures of
    experts excepted, which are stored under other names). Buffers and the second name of a tied tensor are left out."""
    return {name: numpy_of(parameter) for name, parameter in module.named_parameters()}


def gradients_of(module: Any) -> dict[str, np.ndarray]:
    """A copy of its gradients; a parameter that the loss does not reach has zeros."""
    return {
        name: np.zeros(tuple(one.shape), np.float32) if one.grad is None else numpy_of(one.grad)
        for name, one in module.named_parameters()
    }


def typed(where: str, name: str, array: Array, dtype: np.dtype) -> np.ndarray:
    """In the recording's dtype; nothing is rounded on the way."""
    found = numpy_of(array)
    if found.dtype.kind not in "fiub":
        raise UserError(f"{where}: {name} has dtype {found.dtype}, which is no number")
    python = not hasattr(array, "dtype")  # Python's floats are all 64 bits wide, whatever they come from
    if found.dtype.kind == "f" and found.dtype.itemsize > dtype.itemsize and not python:
        raise UserError(
            f"{where}: {name} is {found.dtype}, the recording {dtype}: record in float64, or give the array that the "
            "trainer computes with"
        )
    return found.astype(dtype)


def integers_of(where: str, name: str, array: Array) -> np.ndarray:
    found = numpy_of(array)
    if found.dtype.kind not in "iu":
        raise UserError(f"{where}: {name} must be integers, got {found.dtype}")
    return found


def mask_of(where: str, name: str, array: Array) -> np.ndarray:
    """bool, from bool or numbers that are 0 and 1."""
    found = numpy_of(array)
    if found.dtype.kind not in "biuf" or not np.isin(found, (0, 1)).all():
        raise UserError(f"{where}: {name} must be a mask, True and False or 1 and 0, got {found.dtype} with others")
    return found.astype(bool)


def same_shape(where: str, name: str, found: np.ndarray, shape: tuple[int, ...], of: str) -> None:
    if found.shape != shape:
        raise UserError(
            f"{where}: {name} has shape {list(found.shape)}, expected {list(shape)} ({of}); per-token arrays are "
            "response-aligned, one column for each response token"
        )


def check_finite(where: str, name: str, found: np.ndarray) -> None:
    bad = ~np.isfinite(found)
    if bad.any():
        index = [int(place) for place in np.argwhere(bad)[0]]
        raise UserError(
            f"{where}: {name} is {found[bad][0]} at {index} ({int(bad.sum())} of {found.size} numbers): it counts "
            "there, so mend it in the trainer, or mask that slot"
        )


def check_logprobs(where: str, name: str, found: np.ndarray) -> None:
    """Log-probabilities are at most 0, up to rounding."""
    if found.max(initial=0.0) > 1e-4:
        index = [int(place) for place in np.unravel_index(int(found.argmax()), found.shape)]
        raise UserError(
            f"{where}: {name} is {found.max():.6g} at {index}: a log-probability is at most 0. Are these logits, "
            "losses (the other sign), or a filler inside the mask?"
        )


def check_contiguous(where: str, mask: np.ndarray) -> None:
    """Each row's tokens lie next to each other, and there is one."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    wrong = (edges == 1).sum(axis=1) != 1
    if wrong.any():
        raise UserError(f"{where}: attention: row {int(wrong.argmax())} is empty, or has a hole between its tokens")


def check_left_padded(where: str, mask: np.ndarray) -> None:
    wrong = ~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(axis=1)
    if wrong.any():
        raise UserError(
            f"{where}: prompt_mask: row {int(wrong.argmax())} is not a prompt padded on the left (False, then True to "
            "the last column): roll it, so that the response begins right after the last prompt token"
        )


def check_prefix(where: str, name: str, mask: np.ndarray, *, empty: bool) -> None:
    """Each row is True from slot 0 to its last token; empty: or nowhere."""
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(axis=1)
    if holes.any():
        raise UserError(
            f"{where}: {name}: row {int(holes.argmax())} must be True from slot 0 to the last token and False after: a "
            "hole would shift positions"
        )
    if not empty and not mask[:, 0].all():
        raise UserError(f"{where}: {name}: row {int((~mask[:, 0]).argmax())} is empty: there is no token to compare")


def check_matches(where: str, name: str, tensors: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> None:
    """The names and shapes of weights_before."""
    for key in sorted(tensors.keys() ^ before.keys()):
        side = "weights_before" if key in tensors else name
        raise UserError(f"{where}: {key} is missing in {side} (a tensor that got no gradient has zeros there)")
    for key, one in tensors.items():
        if one.shape != before[key].shape:
            raise UserError(
                f"{where}: {name}: {key} has shape {list(one.shape)}, in weights_before {list(before[key].shape)}"
            )


def check_norm(where: str, norm: float, reported: float | None) -> None:
    """The gradients are there, and those whose norm the trainer reports."""
    if norm == 0 and reported != 0:
        raise UserError(
            f"{where}: all gradients are 0: read them after backward() and before zero_grad() (where they are meant, "
            "give grad_norm=0)"
        )
    if reported is not None and not abs(norm - reported) <= NORMS_AGREE * max(norm, reported):
        raise UserError(
            f"{where}: the norm of the gradients is {norm:.6g}, the trainer reports {reported:.6g}: these are not its "
            "gradients (clipped already, of one micro-batch, or scaled?); read them before clipping"
        )


def check_moved(where: str, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    if all(np.array_equal(before[name], after[name]) for name in before):
        raise UserError(
            f"{where}: weights_before and weights_after are the same numbers although there is a gradient: torch "
            "changes weights in place, so take a copy before the step, weights_of(model)"
        )


def positions_of(attention: np.ndarray) -> np.ndarray:
    """The index of each real token within its row, 0 on padding."""
    return np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32)


def placed(array: np.ndarray, shape: tuple[int, ...], start: int) -> np.ndarray:
    """Response-aligned columns at their place in the whole row, 0 elsewhere."""
    wide = np.zeros(shape, array.dtype)
    wide[:, start : start + array.shape[1]] = array
    return wide


def scalars_of(where: str, name: str, scalars: Mapping[str, Any]) -> dict[str, float]:
    """Python floats, from numbers and arrays of one."""
    found = {}
    for key, value in scalars.items():
        one = numpy_of(value)
        if one.size != 1 or one.dtype.kind not in "fiub":
            raise UserError(f"{where}: {name}: {key} must be one number, got {one.dtype} {list(one.shape)}")
        found[key] = float(one.reshape(()))
    return found


def config_of(where: object, role: str, config: Any) -> dict[str, Any]:
    """The contents of config.json, of a mapping or of a configuration of transformers."""
    if hasattr(config, "to_json_string"):
        config = json.loads(config.to_json_string())
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise UserError(
            f"{where}: models: {role}: give the contents of its config.json (with model_type), or model.config"
        )
    return dict(config)
