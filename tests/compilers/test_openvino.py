"""OpenVINO takes every graph and gives onnxruntime's logits, with the settings of docs/onnx.md."""

import numpy as np
import pytest
import sequences
from exported_models import RECIPES, Exported, assert_alike, divergence, rounds_while_it_runs, settings

pytestmark = pytest.mark.compilers

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def logits(one: Exported, options: dict) -> dict[str, np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(one.model, "CPU", {**options, "INFERENCE_NUM_THREADS": 1})
    past = [port for port in compiled.inputs if port.any_name.startswith("past_key_values.")]

    def start(batch: int):
        request, state = compiled.create_infer_request(), {port.any_name: empty(port, batch) for port in past}

        def step(ids, mask):
            request.infer({"input_ids": ids, "attention_mask": mask, **state})
            state.update(
                {name: copied(request.get_tensor(name.replace("past_key_values", "present"))) for name in state}
            )
            return np.array(request.get_tensor("logits").data)

        return step

    return sequences.run(start, one.vocabulary)


def empty(port, batch: int):
    """A past of zeros; numpy has no word for some of their types."""
    import openvino

    shape = sequences.past_shape([d.get_length() if d.is_static else "" for d in port.partial_shape], batch)
    past = openvino.Tensor(port.element_type, shape)
    if past.byte_size:
        past.data[...] = 0
    return past


def copied(state):
    """The next call overwrites the request's own."""
    import openvino

    copy = openvino.Tensor(state.element_type, state.shape)
    if state.byte_size:
        state.copy_to(copy)
    return copy


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_gives_onnxruntimes_logits(recipes, name):
    assert recipes[name].row("openvino").loads
    assert_alike(logits(recipes[name], EXACT), recipes[name].logits, rounds_while_it_runs(name), name)


@pytest.mark.parametrize("name", settings())
def test_every_format_gives_onnxruntimes_logits_or_is_said_to_be_refused(variants, name):
    one = variants[name]
    if one.row("openvino").loads:
        assert_alike(logits(one, EXACT), one.logits, rounds_while_it_runs(name), name)
    else:
        with pytest.raises(RuntimeError, match="cannot be divided by block_size"):
            logits(one, EXACT)


def test_its_own_settings_round_inputs_and_stay_close(recipes):
    one = recipes["tiny-int8, tiny-jamba"]
    found = logits(one, {})
    assert max(divergence(expected, found[name]) for name, expected in one.logits.items()) <= 0.05
