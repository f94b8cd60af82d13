"""Runs an exported decoder under onnxruntime: states are held as OrtValues and handed from step to step uncopied."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import torch

from compress import state_names
from compress.errors import InputError, first_line

LOAD_FACTOR = 3.0  # peak memory of a session over the artifact's bytes: 2.7 measured (benchmarks/RESULTS.md), for prepacked copies


class OnnxSession:
    """A loaded model.onnx with the contract's inputs and outputs. `options` are session options by name."""

    def __init__(self, path: Path, options: dict[str, str] | None = None, threads: int = 0):
        _refuse_too_large(path)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        for key, value in (options or {}).items():
            settings.add_session_config_entry(key, value)
        try:
            self._session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise InputError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        inputs = {value.name: value for value in self._session.get_inputs()}
        if not {"input_ids", "attention_mask"} <= inputs.keys():
            raise InputError(f"{path}: not a decoder this tool exports; expected inputs input_ids and attention_mask")
        self.past = {name: value for name, value in inputs.items() if state_names.is_past(name)}
        self.vocab_size = int(self._session.get_outputs()[0].shape[-1])

    def start(self, batch: int) -> "Generation":
        return Generation(self._session, self.past, batch)


class Generation:
    """One batch of sequences: `step` feeds [B, S] more tokens and returns their logits [B, S, V]."""

    def __init__(self, session: ort.InferenceSession, past: dict, batch: int):
        self._session, self._batch, self._seen = session, batch, np.ones((batch, 0), np.int64)
        self._outputs = ["logits", *(state_names.present_of(name) for name in past)]
        self._state = {name: ort.OrtValue.ortvalue_from_numpy(_empty(value, batch)) for name, value in past.items()}

    def step(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """`attention_mask` [B, S] is 0 for left padding among the new tokens; all are tokens by default."""
        new = np.ones(ids.shape, np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        self._seen = np.concatenate([self._seen, new], 1)
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids, np.int64)),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(self._seen),
            **self._state,
        }
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        self._state = dict(zip(self._state, present, strict=True))
        return logits.numpy()


class OnnxDecoder:
    """`step(ids [B, S])` returns the last logits [B, V]: the tensors-only view that generation shares with checkpoints."""

    def __init__(self, generation: Generation):
        self._generation = generation

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._generation.step(ids.numpy())[:, -1].copy())


def _empty(value, batch: int) -> np.ndarray:
    """The empty past of one input: batch in the first dimension, a past of length 0 where that is dynamic, zeros."""
    shape = [batch] + [size if isinstance(size, int) else 0 for size in value.shape[1:]]
    return np.zeros(shape, {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type])


def _refuse_too_large(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size + sum(p.stat().st_size for p in path.parent.glob(path.name + "[._]data"))
    available = psutil.virtual_memory().available
    if size * LOAD_FACTOR > available:
        raise InputError(
            f"{path}: needs about {size * LOAD_FACTOR / 2**30:.1f} GiB of memory to run, {available / 2**30:.1f} GiB are free"
        )
