"""Registers every model family with optimum's `TasksManager`, so that
`get_exporter_config_constructor("onnx", model_type="jamba")` works."""

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig
from optimum.utils.input_generators import DEFAULT_DUMMY_SHAPES, DummyInputGenerator, DummyTextInputGenerator
from transformers import PretrainedConfig

from compress.model import families
from compress.model.states import StateSpec
from compress.runtime.graph_names import BATCH, PAST, SEQUENCE, TOTAL, dimensions, past_of, present_of

Axes = dict[str, dict[int, str]]


class HybridConfig(NormalizedTextConfig):
    """optimum's view of a transformers configuration, and the architecture it describes, validated as ours."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.architecture = families.get(config.model_type).parse(config.to_dict(), "config")

    def states(self) -> list[tuple[int, StateSpec]]:
        """With the index of their layer."""
        return [(layer.index, spec) for layer in self.architecture.layers for spec in layer.carried]


class HybridStateGenerator(DummyInputGenerator):
    """The states a first step begins with: an empty past on attention layers, states of full size on the others."""

    SUPPORTED_INPUT_NAMES = ("past_key_values.",)

    def __init__(
        self,
        task: str,
        normalized_config: HybridConfig,
        batch_size: int = DEFAULT_DUMMY_SHAPES["batch_size"],
        **_: object,
    ):
        self._batch = batch_size
        self._states = {past_of(index, spec): spec for index, spec in normalized_config.states()}

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> object:
        spec = self._states[input_name]
        if not spec.precision.is_plain:
            return spec.empty(self._batch)  # of bytes that mean nothing by themselves
        return self.random_float_tensor(list(spec.sized(self._batch)), framework=framework, dtype=spec.precision.format)


class HybridExporterConfig(ExporterConfig):
    """Inputs and outputs of our graph in optimum's terms. The graph always carries its states."""

    NORMALIZED_CONFIG_CLASS = HybridConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, HybridStateGenerator)
    SUPPORTS_PAST = True

    def __init__(
        self,
        config: PretrainedConfig,
        task: str = "text-generation",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",
        use_past: bool = False,
    ):
        super().__init__(config, task, int_dtype, float_dtype)
        self.use_past = use_past

    @property
    def inputs(self) -> Axes:
        tokens = {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: TOTAL}}
        return tokens | {past_of(index, spec): _axes(spec, PAST) for index, spec in self._normalized_config.states()}

    @property
    def outputs(self) -> Axes:
        states = self._normalized_config.states()
        present = {present_of(past_of(index, spec)): _axes(spec, TOTAL) for index, spec in states}
        return {"logits": {0: BATCH, 1: SEQUENCE}} | present


def _axes(spec: StateSpec, length: str) -> dict[int, str]:
    return {axis: size for axis, size in enumerate(dimensions(spec, length)) if isinstance(size, str)}


def register() -> None:
    """Adds our families to optimum's table for the `onnx` exporter; doing it twice changes nothing."""
    add = TasksManager.create_register("onnx")
    for name in families.names():
        add(name, "text-generation", "text-generation-with-past")(HybridExporterConfig)
