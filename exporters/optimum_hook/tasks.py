"""Registers Jamba with optimum's `TasksManager`, so that `get_exporter_config_constructor("onnx", model_type="jamba")` works."""

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DEFAULT_DUMMY_SHAPES, DummyInputGenerator, DummyTextInputGenerator

from compress.model.families import jamba
from exporters.architectures.jamba import BATCH, PAST, TOTAL, state_shapes

Axes = dict[str, dict[int, str]]


class HybridStateGenerator(DummyInputGenerator):
    """The states a first step begins with: an empty past on attention layers, states of full size on the others."""

    SUPPORTED_INPUT_NAMES = ("past_key_values.",)

    def __init__(self, task, normalized_config, batch_size=DEFAULT_DUMMY_SHAPES["batch_size"], **_):
        self._jamba, self._batch = normalized_config.config, batch_size

    def generate(self, input_name, framework="pt", int_dtype="int64", float_dtype="fp32"):
        _, index, name = input_name.split(".")
        shape = [self._batch if size == BATCH else size for size in state_shapes(self._jamba, int(index), 0)[name]]
        return self.random_float_tensor(shape, framework=framework, dtype=float_dtype)


def _normalized(config) -> jamba.normalized:
    """optimum's view of a transformers configuration, validated as ours on the way."""
    return jamba.normalized(jamba.parse_config(config.to_dict(), "config"))


class JambaExporterConfig(ExporterConfig):
    """Inputs and outputs of our Jamba graph in optimum's terms. The graph always carries its states."""

    NORMALIZED_CONFIG_CLASS = staticmethod(_normalized)
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, HybridStateGenerator)
    SUPPORTS_PAST = True

    def __init__(self, config, task="text-generation", int_dtype="int64", float_dtype="fp32", use_past=False):
        super().__init__(config, task, int_dtype, float_dtype)
        self.use_past = use_past
        self._jamba = self._normalized_config.config

    @property
    def inputs(self) -> Axes:
        tokens = {"input_ids": {0: "batch_size", 1: "sequence_length"}, "attention_mask": {0: "batch_size", 1: TOTAL}}
        return tokens | self._states("past_key_values", PAST)

    @property
    def outputs(self) -> Axes:
        return {"logits": {0: "batch_size", 1: "sequence_length"}} | self._states("present", TOTAL)

    def _states(self, prefix: str, length: str) -> Axes:
        return {
            f"{prefix}.{index}.{name}": {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
            for index in range(self._jamba.num_hidden_layers)
            for name, shape in state_shapes(self._jamba, index, length).items()
        }


def register() -> None:
    """Adds Jamba to optimum's table for the `onnx` exporter; doing it twice changes nothing."""
    TasksManager.create_register("onnx")("jamba", "text-generation", "text-generation-with-past")(JambaExporterConfig)
