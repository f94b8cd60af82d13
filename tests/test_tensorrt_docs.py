"""What docs/tensorrt.md tells users to run, as far as a machine without a GPU can."""

import re
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from compress.apply import exporting
from compress.runtime.onnx_session import OnnxDecoder, OnnxSession

TEXT = (Path(__file__).parents[1] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
LOOP = next(code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "def step(" in code)


def greedy(path: Path, tokens: int) -> list[int]:
    """From BOS, by our own session."""
    decoder, found = OnnxDecoder(OnnxSession(path).start(1)), [1]
    for _ in range(tokens):
        found.append(int(decoder.step(torch.tensor([found[-1:]])).argmax()))
    return found


@pytest.mark.parametrize("model", ["tiny-jamba", "tiny-nemotron-h"])
def test_the_loop_that_keeps_states_on_the_device_generates_what_the_session_does(tmp_path, model):
    source = Path(__file__).parents[1] / "models" / model
    folder = exporting.export_checkpoint(source, "tensorrt", tmp_path / "out", ["precision=fp32", "build=never"])
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = {"ort": ort, "session": session, "device": "cpu"}
    exec(LOOP, names)
    assert names["tokens"] == greedy(folder / "model.onnx", 20)
