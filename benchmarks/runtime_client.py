"""One artifact under one runtime: `python runtime_client.py RUNTIME FOLDER JOB.json`, started by runtimes.py.

Needs numpy and the runtime alone, so that an environment with an old onnxruntime and nothing else runs it. The job has
`prompt` (ids, before which nothing is put), `tokens` (how many to generate) and `text` (ids). Prints as JSON: the version,
the tokens generated greedily, and logits of `text` [S, V], at once (`prefill`) and token by token (`decode`), to a file.
"""

import json
import sys
from pathlib import Path

import numpy as np

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # docs/onnx.md


class Stateful:
    """A model of the contract's inputs and outputs: `step(ids [1, S])` returns logits [S, V]."""

    def __init__(self, run, past: dict[str, list]):
        self._run, self._past = run, past
        self.clear()

    def clear(self) -> None:
        self._seen = 0
        self._state = {
            name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in shape[1:])], np.float32)
            for name, shape in self._past.items()
        }

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._seen += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, self._seen), np.int64), **self._state}
        logits, self._state = self._run(feeds)
        return logits[0]


def with_onnxruntime(folder: Path, level: str | None = None) -> tuple[str, Stateful]:
    """`level` is the accuracy level of fused products, the runtime's own where None."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]

    def run(feeds):
        logits, *present = session.run(outputs, feeds)
        return logits, dict(zip(past, present, strict=True))

    return ort.__version__, Stateful(run, past)


def with_openvino(folder: Path) -> tuple[str, Stateful]:
    import openvino

    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", EXACT)
    past = {
        port.any_name: [size.get_length() if size.is_static else "" for size in port.partial_shape]
        for port in compiled.inputs
        if port.any_name.startswith("past_key_values.")
    }
    request = compiled.create_infer_request()

    def run(feeds):
        found = request.infer(feeds)
        present = {name: np.array(found[name.replace("past_key_values", "present")]) for name in past}
        return np.array(found["logits"]), present

    return openvino.get_version().split("-")[0], Stateful(run, past)


class Genai:
    """onnxruntime-genai behind the same two methods; it gives the logits of the last token only."""

    def __init__(self, model, module):
        self._model, self._module = model, module
        self.clear()

    def clear(self) -> None:
        parameters = self._module.GeneratorParams(self._model)
        parameters.set_search_options(max_length=4096, do_sample=False)
        self._generator = self._module.Generator(self._model, parameters)

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._generator.append_tokens(np.ascontiguousarray(ids, np.int32))
        return self._generator.get_logits()[0, -1:]


def with_genai(folder: Path) -> tuple[str, Genai]:
    from importlib.metadata import version

    import onnxruntime_genai as genai

    return version("onnxruntime-genai"), Genai(genai.Model(str(folder)), genai)


def with_exact_onnxruntime(folder: Path) -> tuple[str, Stateful]:
    version, model = with_onnxruntime(folder, "1")
    return f"{version}, level 1", model


RUNTIMES = {
    "onnxruntime": with_onnxruntime,
    "onnxruntime-exact": with_exact_onnxruntime,
    "openvino": with_openvino,
    "genai": with_genai,
}


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    model.clear()
    found, ids = [], prompt
    for _ in range(tokens):
        found.append(int(model.step(np.array([ids], np.int64))[-1].argmax()))
        ids = found[-1:]
    return found


def logits(model, text: list[int]) -> dict[str, np.ndarray]:
    model.clear()
    whole = model.step(np.array([text], np.int64))
    model.clear()
    steps = [model.step(np.array([[token]], np.int64)) for token in text]
    return {"prefill": whole, "decode": np.concatenate(steps)}


def main() -> None:
    runtime, folder, job = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    version, model = RUNTIMES[runtime](folder)
    np.savez(job["out"], **logits(model, job["text"]))
    print(json.dumps({"version": version, "tokens": greedy(model, job["prompt"], job["tokens"])}))


if __name__ == "__main__":
    main()
