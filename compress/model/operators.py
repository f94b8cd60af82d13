"""The words that blocks are written in.

A block is written once, in these. `runtime/eager.py` computes them with torch, a dialect in `exporters/dialects/` adds them to
a graph: so neither knows what an architecture is, and no architecture has an exporter of its own. T is a tensor, or a value of
a graph. An instance speaks of one layer: weights are named within it, as in "mamba.in_proj.weight".

    B   batch             S   tokens given now            T   past + S, all tokens attended to
    H   hidden_size       F   intermediate_size           E   experts             R   rows of the router, E or more
    D   d_inner           N   d_state                     W   d_conv, the convolution's width
    Q   query heads       G   key-value heads, groups     P   head_dim

Padding, before the tokens or after them, leaves every state as it was: operators over time know where it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from compress.model.routing import Router
from compress.model.states import StateSpec

T = TypeVar("T")


class Operators(ABC, Generic[T]):
    @abstractmethod
    def linear(self, name: str, x: T, bias: str | None = None) -> T:
        """x [..., K] times the transpose of the matrix [N, K], plus the bias [N]. Where the matrix is stored so, its input is
        rotated and rounded first. Matrices are only ever multiplied here: calibration listens here."""

    @abstractmethod
    def rms_norm(self, x: T, name: str, eps: float, groups: int = 1) -> T:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, or over each of `groups` equal parts of it (Zhang &
        Sennrich, arXiv 1910.07467)."""

    @abstractmethod
    def add(self, a: T, b: T) -> T: ...

    @abstractmethod
    def subtract(self, a: T, b: T) -> T: ...

    @abstractmethod
    def multiply(self, a: T, b: T) -> T: ...

    @abstractmethod
    def scale(self, x: T, factor: float) -> T: ...

    @abstractmethod
    def silu(self, x: T) -> T:
        """x * sigmoid(x)."""

    @abstractmethod
    def squared_relu(self, x: T) -> T:
        """max(x, 0)^2 (So et al., Primer, arXiv 2109.08668)."""

    @abstractmethod
    def softplus(self, x: T) -> T:
        """log(1 + exp(x))."""

    @abstractmethod
    def add_weight(self, x: T, name: str) -> T:
        """x [..., K] plus a weight [K]."""

    @abstractmethod
    def split(self, x: T, sizes: Sequence[int]) -> tuple[T, ...]:
        """Parts of the last dimension, in order."""

    @abstractmethod
    def causal_conv(self, x: T, state: T, weight: str, bias: str | None) -> tuple[T, T]:
        """Depthwise causal convolution over time: x [B, S, D], state [B, D, W - 1] (the last inputs), weight [D, 1, W] ->
        y [B, S, D], the state after the last token. x counts as 0 at padding."""

    @abstractmethod
    def selective_scan(
        self, x: T, dt: T, b: T, c: T, state: T, a_log: str, d: str, earlier: T | None = None
    ) -> tuple[T, T]:
        """Mamba-1 (Gu & Dao, arXiv 2312.00752, eq. 2, the zero-order hold on A only), A = -exp(A_log):

            h_t = exp(dt_t A) h_{t-1} + dt_t b_t x_t        y_t = c_t . h_t + d x_t

        x and dt (after softplus) [B, S, D]; b, c [B, S, N]; state h [B, N, D]; a_log [D, N]; d [D] -> y [B, S, D], state.
        `earlier` [B, tokens, 2 D + N]: x, dt and b of tokens to be read first, none of them padding."""

    @abstractmethod
    def ssd(self, x: T, dt: T, b: T, c: T, state: T, a_log: str, d: str, earlier: T | None = None) -> tuple[T, T]:
        """Mamba-2 (Dao & Gu, arXiv 2405.21060): as above with one decay a head, heads sharing b and c in groups.

        x [B, S, heads * P]; dt (after softplus) [B, S, heads]; b, c [B, S, groups * N]; state [B, heads, N, P]; a_log and
        d [heads] -> y [B, S, heads * P], the state after the last token. `earlier` as above,
        [B, tokens, heads * P + heads + groups * N]."""

    @abstractmethod
    def last_inputs(self, x: T, dt: T, b: T) -> T:
        """What a scan takes of the last token of each row, as `earlier` has it: [B, 1, ...]; anything where the row has none."""

    @abstractmethod
    def attention(self, query: T, key: T, value: T, past_key: T, past_value: T, rotary: float | None) -> tuple[T, T, T]:
        """Causal attention, G key-value heads each serving Q / G query heads, scores divided by sqrt(P).

        query [B, S, Q * P], key and value [B, S, G * P], past key and value [B, G, T - S, P] -> mixed [B, S, Q * P], key and
        value [B, G, T, P]. `rotary`: the base of rotary positions (Su et al., arXiv 2104.09864; halves rotated, as in Llama),
        counted in real tokens; None where there are none."""

    @abstractmethod
    def mixture(self, x: T, rows: T, router: Router, experts: int, run: Callable[[int, T], T]) -> T:
        """Sparse mixture of experts: the router looks at x [B, S, H], the experts it chooses for a token work on that token
        of `rows` [B, S, K], and what they give is summed, weighted by their gates. `run(e, rows)` is expert e on [n, K]."""

    @abstractmethod
    def state_in(self, spec: StateSpec, stored: T) -> T:
        """A state as arithmetic takes it, from what was kept between calls."""

    @abstractmethod
    def state_out(self, spec: StateSpec, value: T, kept: T, due: T | None = None) -> T:
        """A state as it is kept between calls: the one place where a state is rounded. `kept` is what was kept before this
        call: of a state that grows it stays, and only what is new of `value` is stored behind it; in rows that are not `due`
        it stays bit for bit."""

    @abstractmethod
    def due(self, given: T, every: int) -> T:
        """In which rows a state that is rounded every so many tokens is rounded now: whether they read several tokens of
        `given` [B, S, H], or one and have now read a multiple of `every`."""

    @abstractmethod
    def inputs_out(self, value: T, kept: T, given: T, every: int) -> T:
        """The inputs [B, every - 1, ...] since a state was rounded, in 16 bits: zeros in rows that are `due`; in the others
        what was `kept`, and `value` [B, 1, ...] in the slot of the row's token, if it read one. What is beyond the range of
        the type becomes its largest."""
