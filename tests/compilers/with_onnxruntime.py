"""Runs graphs under the onnxruntime of the interpreter it is started with: `python with_onnxruntime.py JOBS.json`.

A job is {"model", "out", "vocabulary", "level"}; logits by sequence go to `out` (.npz). Prints the version."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import sequences

# what onnxruntime calls a state's type: the numpy type that holds its bytes, and ONNX's number where numpy has no such type
TYPES = {
    "tensor(float)": (np.float32, None), "tensor(float16)": (np.float16, None), "tensor(int8)": (np.int8, None),
    "tensor(uint8)": (np.uint8, None), "tensor(bfloat16)": (np.uint16, 16), "tensor(float8e4m3fn)": (np.uint8, 17),
}  # fmt: skip


def logits(model: str, vocabulary: int, level: str | None) -> dict[str, np.ndarray]:
    """By sequence; `level` is the accuracy level of fused products, onnxruntime's own where None."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    outputs = ["logits", *(i.name.replace("past_key_values", "present") for i in past)]

    def start(batch: int):
        state = {i.name: empty(i, batch) for i in past}

        def step(ids, mask):
            given = {"input_ids": ids, "attention_mask": mask}
            given = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in given.items()}
            new, *present = session.run_with_ort_values(outputs, {**given, **state})
            state.update(zip(state, present, strict=True))
            return new.numpy()

        return step

    return sequences.run(start, vocabulary)


def empty(given, batch: int) -> ort.OrtValue:
    """A past of zeros."""
    held_as, number = TYPES[given.type]
    zeros = np.zeros(sequences.past_shape(given.shape, batch), held_as)
    if number is None:
        return ort.OrtValue.ortvalue_from_numpy(zeros)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, number)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        np.savez(job["out"], **logits(job["model"], job["vocabulary"], job["level"]))
    print(ort.__version__)
