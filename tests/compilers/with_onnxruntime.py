"""Runs graphs under the onnxruntime of the interpreter it is started with: `python with_onnxruntime.py JOBS.json`.

A job is {"model", "out", "vocabulary", "level"}; logits by sequence go to `out` (.npz). Prints the version."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import sequences


def logits(model: str, vocabulary: int, level: str | None) -> dict[str, np.ndarray]:
    """By sequence; `level` is the accuracy level of fused products, onnxruntime's own where None."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]

    def start(batch: int):
        state = sequences.empty_past(past, batch)

        def step(ids, mask):
            new, *present = session.run(outputs, {"input_ids": ids, "attention_mask": mask, **state})
            state.update(zip(past, present, strict=True))
            return new

        return step

    return sequences.run(start, vocabulary)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        np.savez(job["out"], **logits(job["model"], job["vocabulary"], job["level"]))
    print(ort.__version__)
