"""FLOPs of a traced function, counted on its jaxpr: what the mathematics asks for, on all devices together.

Only products count (`dot_general`, `ragged_dot`, convolutions): two FLOPs for a multiply-add, as peak figures count
them. A scan's body counts as often as it runs, a while loop's as often as the caller says, of a conditional's branches
the dearest (of `jax.lax.platform_dependent` the default), a Pallas kernel's body once for every point of its grid. What
`jax.checkpoint` makes the backward pass compute a second time is counted, and told apart.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Flops(NamedTuple):
    """all: everything that runs. again: the part that repeats the forward pass for the backward pass."""

    all: float
    again: float

    @property
    def needed(self) -> float:
        return self.all - self.again


NONE = Flops(0.0, 0.0)


def count(jaxpr: Any, *, while_trips: float = 1.0) -> Flops:
    """FLOPs of a jaxpr, open or closed. while_trips: how often the body of each while loop runs."""
    total = NONE
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        one = _equation(equation, while_trips)
        # JAX's own mark on what a checkpoint repeats.
        is_again = "rematted_computation" in str(equation.source_info.name_stack)
        total = Flops(total.all + one.all, total.again + (one.all if is_again else one.again))
    return total


def _equation(equation: Any, while_trips: float) -> Flops:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            return Flops(_dot(equation), 0.0)
        case "ragged_dot_general":
            return Flops(_ragged(equation), 0.0)
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            return Flops(2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features, 0.0)
        case "scan":
            return _times(count(params["jaxpr"], while_trips=while_trips), float(params["length"]))
        case "while":
            return _times(count(params["body_jaxpr"], while_trips=while_trips), while_trips)
        case "cond" if params.get("branches_platforms"):  # the default comes last
            return count(params["branches"][-1], while_trips=while_trips)
        case "cond":
            return max((count(branch, while_trips=while_trips) for branch in params["branches"]), default=NONE)
        case "shard_map":  # its jaxpr is one device's share
            return _times(count(params["jaxpr"], while_trips=while_trips), float(params["mesh"].size))
        case "pallas_call":
            grid = [size for size in params["grid_mapping"].grid if isinstance(size, int)]
            return _times(count(params["jaxpr"], while_trips=while_trips), float(math.prod(grid)))
        case _:  # calls: `jit`, `remat`, custom derivatives before they are taken
            inner = [params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params]
            found = [count(one, while_trips=while_trips) for one in inner]
            return Flops(sum((one.all for one in found), 0.0), sum((one.again for one in found), 0.0))


def _times(flops: Flops, times: float) -> Flops:
    return Flops(flops.all * times, flops.again * times)


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged(equation: Any) -> float:
    """Every ragged row meets the matrix of its own group alone; where the ragged axis is contracted (the gradient of
    the matrices) every row goes into the matrix of its own group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    products = math.prod(out) * math.prod(left[axis] for axis in contracted)
    groups = out[0] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
    return 2.0 * products / groups
