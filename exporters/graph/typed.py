"""A graph for TensorRT, which casts nothing to fp8 or from it, and moves no unsigned bytes."""

import onnx_ir as ir

from exporters.graph.builder import FLOAT, Graph

FP8 = ir.DataType.FLOAT8E4M3FN


class TypedGraph(Graph):
    unmoved = Graph.unmoved | {ir.DataType.UINT8}

    def cast(self, value: ir.Value, to: ir.DataType, dtype: ir.DataType | None = None) -> ir.Value:
        """fp8 is quantized to and dequantized from with a step of 1, which gives the same numbers, in float32."""
        came = dtype or value.dtype
        if came != to and to == FP8:
            wide = super().cast(value, ir.DataType.FLOAT, came)
            return self.op("QuantizeLinear", wide, self.constant(1, FLOAT), output_dtype=FP8)
        if came != to and came == FP8:
            wide = self.op("DequantizeLinear", value, self.constant(1, FLOAT))
            return super().cast(wide, to, ir.DataType.FLOAT)
        return super().cast(value, to, dtype)
