"""A stand-in for NVIDIA's `tensorrt` package, as far as we call it: copied under that name, it parses what onnx reads and builds a file of
weights. What it does at last is in COMPRESS_FAKE_BUILDER.
"""

import os
import signal
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import onnx

__version__ = "99.1"
DOES = os.environ.get("COMPRESS_FAKE_BUILDER", "builds")
if DOES == "cannot be imported":
    raise ImportError("libnvinfer.so.99: cannot open shared object file\nand more")

TYPES = {onnx.TensorProto.INT8: "INT8", onnx.TensorProto.INT4: "INT4", onnx.TensorProto.FLOAT8E4M3FN: "FP8"}
Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})
ILogger, IProgressMonitor, IStreamWriter = (
    type(name, (), {}) for name in ("ILogger", "IProgressMonitor", "IStreamWriter")
)
NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
ProfilingVerbosity = SimpleNamespace(DETAILED=2)
LayerInformationFormat = SimpleNamespace(JSON=1)


def named(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name)


class Layer(SimpleNamespace):
    def get_input(self, index):
        return self.inputs[index] if index < len(self.inputs) else None

    def get_output(self, index):
        return self.output


class Network:
    def __init__(self):
        self.layers = []

    @property
    def num_layers(self):
        return len(self.layers)

    def get_layer(self, index):
        return self.layers[index]

    def read(self, graph):
        for tensor in graph.initializer:
            kind = TYPES.get(tensor.data_type, "BF16")
            if DOES == "widens layer 1" and ".layers.1." in tensor.name:
                kind = "BF16"
            output = SimpleNamespace(name=f"{tensor.name}_output", dtype=named(kind))
            self.layers.append(Layer(name=tensor.name, type=named("CONSTANT"), inputs=[], output=output))
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                inputs = [named(f"{name}_output") for name in node.input]
                self.layers.append(Layer(name=node.name, type=named("DEQUANTIZE"), inputs=inputs, output=None))


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.error = network, None

    num_errors = property(lambda self: 1)

    def parse_from_file(self, path):
        graph = onnx.load(path, load_external_data=False).graph
        if DOES == "refuses TopK":
            self.error = next(node for node in graph.node if node.op_type == "TopK")
            return False
        self.network.read(graph)
        self.network.bytes = Path(path + ".data").stat().st_size
        return True

    def get_error(self, index):
        said = "In node 3 (importTopK): UNSUPPORTED_NODE: Assertion failed: creator && plugin TopK was not found in registry"
        return SimpleNamespace(
            desc=lambda: said, node_name=lambda: self.error.name, node_operator=lambda: self.error.op_type
        )


class Config:
    progress_monitor = None

    def __init__(self):
        self.profiles, self.timings = [], b""

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.timings = cache.data

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.timings + b"timed ")

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, usual, high):
        assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True)), name
        self.shapes[name] = low, usual, high


class Builder:
    def __init__(self, logger):
        if DOES == "needs a GPU":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags):
        assert flags == 1, "strongly typed"
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network_to_stream(self, network, config, writer):
        print("what a library prints", flush=True)
        assert len(config.profiles) == 2
        config.progress_monitor.phase_start("Building", None, 2)
        config.progress_monitor.step_complete("Building", 0)
        self.logger.log(named("INFO"), "Total Activation Memory: 4321 bytes")
        self.logger.log(
            named("VERBOSE"), "this engine will not be able to run on target(s): sm80, sm86, because of fp8"
        )
        end(self.logger)
        if DOES == "fails":
            return False
        size = network.bytes + (3_000_000 if DOES == "widens" else 0)
        self.logger.log(named("INFO"), f"Total Weights Memory: {size} bytes")
        writer.write(struct.pack("<4s4xQQ", b"THGW", 24, size))
        writer.write(bytes(size))
        return True


def end(logger):
    """As builders end that do not build."""
    if DOES == "aborts":
        os.abort()
    if DOES == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if DOES == "exits":
        sys.exit(7)
    if DOES == "raises":
        raise MemoryError("std::bad_alloc")
    if DOES == "waits":
        time.sleep(600)
    logger.log(named("ERROR"), "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)")
    if DOES == "fails":
        logger.log(
            named("ERROR"), "IBuilder::build: Error Code 1: Internal Error (layer MatMul_1: no kernel in x.cpp:12)"
        )


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        return None
