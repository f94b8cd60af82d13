"""Registers Jamba with optimum's `TasksManager`, so that `get_exporter_config_constructor("onnx", model_type="jamba")` works."""

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DummyTextInputGenerator

from compress.architectures.jamba import JambaNormalizedConfig, parse_config
from exporters.architectures.jamba import PAST, TOTAL, state_shapes

Axes = dict[str, dict[int, str]]


class JambaExporterConfig(ExporterConfig):
    """Inputs and outputs of our Jamba graph in optimum's terms. The graph always carries its states."""

    NORMALIZED_CONFIG_CLASS = JambaNormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)
    SUPPORTS_PAST = True

    def __init__(self, config, task="text-generation", int_dtype="int64", float_dtype="fp32", use_past=False):
        super().__init__(config, task, int_dtype, float_dtype)
        self.use_past = use_past
        self._jamba = parse_config(config.to_dict(), "config")

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
