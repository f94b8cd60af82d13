"""`portable`: standard operators of opset 21 and float32, for every runtime."""

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from compress.model.routing import Router
from compress.model.states import StateKind, StateSpec
from exporters.dialects.base import Dialect
from exporters.graph import cadence, mamba, moe, position, remembered
from exporters.graph.attention import Angles, attention, causal_bias, past_bias, rotary_angles
from exporters.graph.builder import DTYPES, fixed_shape, like, sizes_of, width_of, with_width
from exporters.graph.linear import linear
from exporters.graph.mamba import TokenMask, causal_conv, decay, scan_step, selective_scan, token_mask
from exporters.graph.norm import rms_norm
from exporters.graph.ssd import replayed, ssd
from exporters.graph.stored import as_stored, matrix, plain, widened
from exporters.graph.table import Table

Value = ir.Value


class Portable(Dialect):
    recurrence = staticmethod(ssd)  # of Mamba-2

    def linear(self, name: str, x: Value, bias: str | None = None) -> Value:
        return linear(self.graph, x, self.weight(name), None if bias is None else self.weight(bias))

    def rms_norm(self, x: Value, name: str, eps: float, groups: int = 1) -> Value:
        return rms_norm(self.graph, x, self.weight(name), eps, groups)

    def add(self, a: Value, b: Value) -> Value:
        return like(self.graph.op("Add", a, b), a)

    def subtract(self, a: Value, b: Value) -> Value:
        return self.graph.op("Sub", a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self.graph.op("Mul", a, b)

    def scale(self, x: Value, factor: float) -> Value:
        return self.graph.op("Mul", x, self.graph.number(factor))

    def silu(self, x: Value) -> Value:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def squared_relu(self, x: Value) -> Value:
        positive = self.graph.op("Relu", x)
        return self.graph.op("Mul", positive, positive)

    def softplus(self, x: Value) -> Value:
        return self.graph.op("Softplus", x)

    def add_weight(self, x: Value, name: str) -> Value:
        return self.graph.op("Add", x, plain(self.graph, self.weight(name)))

    def split(self, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        count, is_even = len(sizes), len(set(sizes)) == 1
        if is_even:
            parts = self.graph.several(count, "Split", x, axis=-1, num_outputs=count)
        else:
            parts = self.graph.several(count, "Split", x, self.graph.constant(sizes), axis=-1)
        return tuple(map(with_width, parts, sizes))

    def causal_conv(self, x: Value, state: Value, weight: str, bias: str | None) -> tuple[Value, Value]:
        graph, kernel = self.graph, self.weight(weight)
        x = self._without_padding(x)
        taps = plain(graph, kernel, lambda w: w[:, 0].T)
        shift = None if bias is None else plain(graph, self.weight(bias))
        real = None if self.tokens.is_one else self._token_mask().real
        return causal_conv(graph, x, state, real, taps, shift, kernel.shape[2])

    def selective_scan(
        self, x: Value, dt: Value, b: Value, c: Value, state: Value, a_log: str, d: str, earlier: Value | None = None
    ) -> tuple[Value, Value]:
        """In float32, whatever the type of hidden states."""
        graph = self.graph
        dt = self._without_padding(dt)
        stored = as_stored(graph, self.weight(a_log), torch.t)
        if earlier is not None:
            state = mamba.replayed(graph, earlier, stored, state)
        scan = scan_step if self.tokens.is_one else selective_scan
        wide_x, wide_dt, wide_b, wide_c = map(graph.float32, (x, dt, b, c))
        y, state = scan(graph, wide_x, wide_dt, stored, wide_b, wide_c, state)
        skipped = graph.op("Mul", x, plain(graph, self.weight(d)))
        return graph.op("Add", graph.from_float32(y), skipped), state

    def ssd(
        self, x: Value, dt: Value, b: Value, c: Value, state: Value, a_log: str, d: str, earlier: Value | None = None
    ) -> tuple[Value, Value]:
        """In float32, whatever the type of hidden states."""
        graph, stored = self.graph, as_stored(self.graph, self.weight(a_log))
        skip = widened(graph, as_stored(graph, self.weight(d)), to=ir.DataType.FLOAT)
        _, heads, d_state, head_dim = sizes_of(state)
        sizes = {"heads": heads, "head_dim": head_dim, "groups": width_of(b) // d_state, "d_state": d_state}
        if earlier is not None:
            state = replayed(graph, earlier, decay(graph, stored), state, **sizes)
        x, dt, b, c = map(graph.float32, (x, self._without_padding(dt), b, c))
        y, state = self.recurrence(graph, x, dt, lambda body: decay(body, stored), b, c, skip, state, **sizes)
        return graph.from_float32(y), state

    def last_inputs(self, x: Value, dt: Value, b: Value) -> Value:
        """float32."""
        inputs = [self.graph.float32(each) for each in (x, dt, b)]
        if not self.tokens.is_one:
            last = self.graph.once("last token", self._last_token)
            inputs = [self.graph.op("MatMul", last, each) for each in inputs]
        return self.graph.op("Concat", *inputs, axis=2)

    def _last_token(self) -> Value:
        graph, given, mask = self.graph, self.tokens.given, self.tokens.mask
        read, in_all = position.read(graph, given, mask), position.read_in_all(graph, mask)
        return cadence.last_token(graph, read, in_all, self._token_mask().keep)

    def attention(
        self, query: Value, key: Value, value: Value, past_key: Value, past_value: Value, rotary: float | None
    ) -> tuple[Value, Value, Value]:
        bias = self.graph.once("causal bias", lambda: self._causal_bias(past_key))
        angles = None if rotary is None else self._angles(rotary, past_key)
        return attention(self.graph, query, key, value, past_key, past_value, bias, angles)

    def mixture(self, x: Value, rows: Value, router: Router, experts: int, run: Callable[[int, Value], Value]) -> Value:
        graph, hidden = self.graph, self.weight(router.weight).shape[1]
        tokens = graph.reshape(x, -1, hidden)
        choice = self._choice(tokens, router, experts)
        width = hidden if rows is x else width_of(rows)
        flat = with_width(tokens if rows is x else graph.reshape(rows, -1, width), width)
        summed = self._mixed(flat, choice, router.top_k, experts, run)
        return with_width(graph.op("Reshape", summed, graph.op("Shape", rows)), width)

    def _choice(self, tokens: Value, router: Router, experts: int) -> moe.Choice:
        """The experts of tokens [tokens, H]; gates are float32."""
        graph = self.graph
        stored = matrix(graph, self.weight(router.weight))
        bias = None if router.bias is None else graph.float32(plain(graph, self.weight(router.bias)))
        return moe.choose(graph, graph.float32(graph.op("MatMul", tokens, stored)), router, experts, bias)

    def _mixed(
        self, rows: Value, choice: moe.Choice, top_k: int, experts: int, run: Callable[[int, Value], Value]
    ) -> Value:
        """rows [tokens, K] -> what their experts give, weighted and summed, as many numbers."""
        choice = choice._replace(gates=self.graph.from_float32(choice.gates))
        return moe.mixture(self.graph, rows, choice, top_k, experts, width_of(rows), run)

    def state_in(self, spec: StateSpec, stored: Value) -> Value:
        dtype = self.state_type(spec)
        if spec.precision.is_plain:
            value = self.graph.cast(stored, dtype)
        else:
            restored = remembered.decoded(self.graph, spec, stored, self._scales(spec))
            value = self.graph.cast(restored, dtype, ir.DataType.FLOAT)
        if value is not stored:
            shape = remembered.restored_shape(spec, fixed_shape(stored))
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        return value

    def state_out(self, spec: StateSpec, value: Value, kept: Value, due: Value | None = None) -> Value:
        graph, dtype = self.graph, self.state_type(spec)
        if spec.precision.is_plain and spec.precision.rounding != "stochastic" and due is None:
            return self._like_kept(spec, graph.cast(value, DTYPES[spec.precision.dtype], dtype), kept)
        wide = graph.cast(value, ir.DataType.FLOAT, dtype)
        stored = remembered.kept_on(graph, spec, wide, kept, self._dithers(spec), self._scales(spec), due)
        return self._like_kept(spec, stored, kept)

    @staticmethod
    def _like_kept(spec: StateSpec, stored: Value, kept: Value) -> Value:
        return like(stored, kept) if spec.grows is None else stored

    def due(self, given: Value, every: int) -> Value:
        """bool [B, 1]."""
        return self.graph.once(("due", every), lambda: cadence.due(self.graph, self._read(), every))

    def inputs_out(self, value: Value, kept: Value, given: Value, every: int) -> Value:
        slot = self.graph.once(("slot", every), lambda: cadence.slot(self.graph, self._read(), every))
        return cadence.inputs_kept(self.graph, value, kept, self.due(given, every), slot)

    def _read(self) -> cadence.Read:
        graph, given, mask = self.graph, self.tokens.given, self.tokens.mask
        now = None if self.tokens.is_one else position.read_now(graph, given, mask)
        return cadence.Read(position.read_in_all(graph, mask), now)

    def _scales(self, spec: StateSpec) -> Value | None:
        """The static ones."""
        if not spec.precision.has_static_scale:
            return None
        weight = self.weight(spec.scale_name)
        return self.graph.once(
            ("scales", weight.name), lambda: widened(self.graph, as_stored(self.graph, weight), to=ir.DataType.FLOAT)
        )

    def _dithers(self, spec: StateSpec) -> Value | None:
        """What rounding adds; the same for all states of one shape."""
        graph, mask, rank = self.graph, self.tokens.mask, len(spec.shape)
        if spec.precision.rounding != "stochastic":
            return None

        def make() -> Value:
            grows = -1 if spec.grows is None else spec.grows
            read = position.read_in_all(graph, mask) if grows < 0 else position.read(graph, self.tokens.given, mask)
            others = [1 + axis for axis in range(rank) if axis != max(grows, 0)]
            return remembered.dithers(graph, spec, graph.op("Unsqueeze", read, graph.constant(others)))

        return graph.once(("dithers", spec.shape, spec.grows, spec.precision.seed), make)

    def state_type(self, spec: StateSpec) -> ir.DataType:
        """That arithmetic takes a state in."""
        return ir.DataType.FLOAT if spec.kind == StateKind.SSM else self.graph.body_type

    def lookup(self, name: str, ids: Value) -> Value:
        return self._table(name).lookup(ids)

    def tied_head(self, name: str, x: Value) -> Value:
        return self._table(name).project(x)

    def _table(self, name: str) -> Table:
        return self.graph.once(("table", name), lambda: Table(self.graph, self.weight(name)))

    def _token_mask(self) -> TokenMask:
        return self.graph.once("token mask", lambda: token_mask(self.graph, self.tokens.given, self.tokens.mask))

    def _without_padding(self, x: Value) -> Value:
        """x [B, S, D], zero at padding."""
        return x if self.tokens.is_one else self.graph.op("Mul", x, self._token_mask().keep)

    def _causal_bias(self, past_key: Value) -> Value:
        if self.tokens.is_one:
            return past_bias(self.graph, self.tokens.mask)
        return causal_bias(self.graph, self.tokens.given, self.tokens.mask, past_key)

    def _angles(self, base: float, past_key: Value) -> Angles:
        head_dim = sizes_of(past_key)[3]
        given, mask = self.tokens.given, self.tokens.mask
        return self.graph.once(
            ("rotary", base, head_dim),
            lambda: rotary_angles(self.graph, given, mask, base, head_dim),
        )
