"""How a state of a layer is carried from call to call, in one tensor or in several (`StateSpec.parts`).

**Error feedback.** With `residual`, what rounding loses is stored too, and the next call begins with the sum:

    stored = round(v)      residual = round(v - stored)      next: stored + residual

**Cadence.** With `every: L`, a state is rounded at every L-th token of a row, and at the end of a call with several. In between
what is stored stays, bit for bit, and the inputs of the tokens since are kept in 16 bits, each in the slot of its place among
the L; a call begins by reading them again. A slot without a token is zeros: a time step of 0 leaves a state as it is.
"""

from collections.abc import Mapping
from typing import TypeVar

from compress.model.operators import Operators
from compress.model.states import StateSpec

T = TypeVar("T")


def begun(ops: Operators[T], spec: StateSpec, kept: Mapping[str, T]) -> dict[str, T]:
    """What arithmetic takes, by name: the state, and the inputs to be read before this call's."""
    value = ops.state_in(spec, kept[spec.name])
    if spec.residual is not None:
        value = ops.add(value, ops.state_in(spec.residual, kept[spec.residual.name]))
    if spec.recent is None:
        return {spec.name: value}
    return {spec.name: value, spec.recent.name: ops.state_in(spec.recent, kept[spec.recent.name])}


def ended(ops: Operators[T], spec: StateSpec, given: T, new: Mapping[str, T], kept: Mapping[str, T]) -> dict[str, T]:
    """What is kept after a call: `given` [B, S, H] were its tokens, `new` has the state after them, and the inputs of the
    last one where those are kept."""
    value = new[spec.name]
    due = None if spec.recent is None else ops.due(given, spec.precision.every)
    stored = ops.state_out(spec, value, kept[spec.name], due)
    left = {spec.name: stored}
    if (residual := spec.residual) is not None:
        lost = ops.subtract(value, ops.state_in(spec, stored))
        left[residual.name] = ops.state_out(residual, lost, kept[residual.name], due)
    if (recent := spec.recent) is not None:
        left[recent.name] = ops.inputs_out(new[recent.name], kept[recent.name], given, spec.precision.every)
    return left
