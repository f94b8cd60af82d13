"""`mamba2`: Mamba-2 (Dao & Gu, arXiv 2405.21060) as Nemotron-H has it (arXiv 2504.03624): one convolution over x, B and C, one
decay a head, heads sharing B and C in groups, and a norm over each group's outputs after their gate."""

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
class Mamba2(Block):
    kind: ClassVar[str] = "mamba2"

    prefix: str
    hidden_size: int
    heads: int
    head_dim: int
    groups: int
    d_state: int
    d_conv: int
    eps: float
    conv_bias: bool = True
    proj_bias: bool = False

    @property
    def d_inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Those of x, B and C."""
        return self.d_inner + 2 * self.groups * self.d_state

    def specs(self) -> Iterator[Spec]:
        hidden, inner, channels, heads = self.hidden_size, self.d_inner, self.conv_channels, (self.heads,)
        yield self._spec("in_proj.weight", (inner + channels + self.heads, hidden), Role.SSM_IN)
        if self.proj_bias:
            yield self._spec("in_proj.bias", (inner + channels + self.heads,), Role.SSM_IN)
        yield self._spec("conv1d.weight", (channels, 1, self.d_conv), Role.SSM_CONV)
        if self.conv_bias:
            yield self._spec("conv1d.bias", (channels,), Role.SSM_CONV)
        yield self._spec("dt_bias", heads, Role.SSM_DT_BIAS)
        yield self._spec("A_log", heads, Role.SSM_A)
        yield self._spec("D", heads, Role.SSM_D)
        yield self._spec("norm.weight", (inner,), Role.NORM)
        yield self._spec("out_proj.weight", (hidden, inner), Role.SSM_OUT)
        if self.proj_bias:
            yield self._spec("out_proj.bias", (hidden,), Role.SSM_OUT)

    def _spec(self, name: str, shape: tuple[int, ...], role: Role) -> Spec:
        return Spec(self.prefix + name, shape, role)

    def states(self) -> tuple[StateSpec, ...]:
        return (
            StateSpec("conv_state", StateKind.CONV, (self.conv_channels, self.d_conv - 1)),
            StateSpec(
                "recurrent_state",
                StateKind.SSM,
                (self.heads, self.d_state, self.head_dim),
                inputs=self.d_inner + self.heads + self.groups * self.d_state,
            ),
        )

    def levels(self) -> tuple[Level, ...]:
        return tuple((InputGroup((f"{self.prefix}{name}_proj.weight",)),) for name in ("in", "out"))

    def folds(self, norm: str) -> tuple[Fold, ...]:
        """Both matrices stand right behind a norm."""
        (entering,), (leaving,) = self.levels()
        return Fold(norm, entering.names), Fold(f"{self.prefix}norm.weight", leaving.names)

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        p, shared = self.prefix, self.groups * self.d_state
        gate, xbc, dt = ops.split(self._linear(ops, "in_proj", x), (self.d_inner, self.conv_channels, self.heads))
        conv_bias = f"{p}conv1d.bias" if self.conv_bias else None
        xbc, conv_state = ops.causal_conv(xbc, state["conv_state"], f"{p}conv1d.weight", conv_bias)
        x, b, c = ops.split(ops.silu(xbc), (self.d_inner, shared, shared))
        dt = ops.softplus(ops.add_weight(dt, f"{p}dt_bias"))
        earlier = state.get("recurrent_inputs")
        y, recurrent_state = ops.ssd(x, dt, b, c, state["recurrent_state"], f"{p}A_log", f"{p}D", earlier)
        gated = ops.rms_norm(ops.multiply(y, ops.silu(gate)), f"{p}norm.weight", self.eps, self.groups)
        new = {"conv_state": conv_state, "recurrent_state": recurrent_state}
        new |= {} if earlier is None else {"recurrent_inputs": ops.last_inputs(x, dt, b)}
        return self._linear(ops, "out_proj", gated), new

    def _linear(self, ops: Operators[T], name: str, x: T) -> T:
        return ops.linear(f"{self.prefix}{name}.weight", x, f"{self.prefix}{name}.bias" if self.proj_bias else None)
