"""`mamba`: Mamba-1 (Gu & Dao, arXiv 2312.00752), with the norms on dt, b and c that Jamba adds (arXiv 2403.19887)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from compress.model.block import Block, Fold, InputGroup, Level
from compress.model.operators import Operators
from compress.model.roles import Role
from compress.model.states import StateKind, StateSpec
from compress.model.weight import Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Mamba1(Block):
    kind: ClassVar[str] = "mamba"

    prefix: str
    hidden_size: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    eps: float
    conv_bias: bool = True
    proj_bias: bool = False

    def specs(self) -> Iterator[Spec]:
        hidden, inner, rank, state = self.hidden_size, self.d_inner, self.dt_rank, self.d_state
        yield self._spec("in_proj.weight", (2 * inner, hidden), Role.SSM_IN)
        if self.proj_bias:
            yield self._spec("in_proj.bias", (2 * inner,), Role.SSM_IN)
        yield self._spec("conv1d.weight", (inner, 1, self.d_conv), Role.SSM_CONV)
        if self.conv_bias:
            yield self._spec("conv1d.bias", (inner,), Role.SSM_CONV)
        yield self._spec("x_proj.weight", (rank + 2 * state, inner), Role.SSM_X_PROJ)
        for name, size in (("dt", rank), ("b", state), ("c", state)):
            yield self._spec(f"{name}_layernorm.weight", (size,), Role.NORM)
        yield self._spec("dt_proj.weight", (inner, rank), Role.SSM_DT_PROJ)
        yield self._spec("dt_proj.bias", (inner,), Role.SSM_DT_BIAS)
        yield self._spec("A_log", (inner, state), Role.SSM_A)
        yield self._spec("D", (inner,), Role.SSM_D)
        yield self._spec("out_proj.weight", (hidden, inner), Role.SSM_OUT)
        if self.proj_bias:
            yield self._spec("out_proj.bias", (hidden,), Role.SSM_OUT)

    def _spec(self, name: str, shape: tuple[int, ...], role: Role) -> Spec:
        return Spec(self.prefix + name, shape, role)

    def states(self) -> tuple[StateSpec, ...]:
        return (
            StateSpec("conv_state", StateKind.CONV, (self.d_inner, self.d_conv - 1)),
            StateSpec(
                "recurrent_state", StateKind.SSM, (self.d_state, self.d_inner), inputs=2 * self.d_inner + self.d_state
            ),
        )

    def levels(self) -> tuple[Level, ...]:
        return tuple((InputGroup((f"{self.prefix}{name}_proj.weight",)),) for name in ("in", "x", "dt", "out"))

    def folds(self, norm: str) -> tuple[Fold, ...]:
        """The input of x_proj is not listed: the convolution's SiLU stands before it. Nor is that of dt_proj: its norm is
        only of use to one small matrix."""
        return (Fold(norm, self.levels()[0][0].names),)

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        inner, bias = self.d_inner, self.proj_bias
        x, gate = ops.split(self._linear(ops, "in_proj", x, bias), (inner, inner))
        conv_bias = f"{self.prefix}conv1d.bias" if self.conv_bias else None
        x, conv_state = ops.causal_conv(x, state["conv_state"], f"{self.prefix}conv1d.weight", conv_bias)
        x = ops.silu(x)
        dt, b, c = self._time_step_and_matrices(ops, x)
        earlier = state.get("recurrent_inputs")
        y, recurrent_state = ops.selective_scan(
            x, dt, b, c, state["recurrent_state"], f"{self.prefix}A_log", f"{self.prefix}D", earlier
        )
        output = self._linear(ops, "out_proj", ops.multiply(y, ops.silu(gate)), bias)
        new = {"conv_state": conv_state, "recurrent_state": recurrent_state}
        new |= {} if earlier is None else {"recurrent_inputs": ops.last_inputs(x, dt, b)}
        return output, new

    def _time_step_and_matrices(self, ops: Operators[T], x: T) -> tuple[T, T, T]:
        """dt [B, S, D], b and c [B, S, N] from the scan's input; Jamba normalises each, unlike Mamba."""
        parts = ops.split(self._linear(ops, "x_proj", x, False), (self.dt_rank, self.d_state, self.d_state))
        low_rank, b, c = (
            ops.rms_norm(part, f"{self.prefix}{name}_layernorm.weight", self.eps)
            for name, part in zip(("dt", "b", "c"), parts, strict=True)
        )
        return ops.softplus(self._linear(ops, "dt_proj", low_rank, True)), b, c

    def _linear(self, ops: Operators[T], name: str, x: T, bias: bool) -> T:
        return ops.linear(f"{self.prefix}{name}.weight", x, f"{self.prefix}{name}.bias" if bias else None)
