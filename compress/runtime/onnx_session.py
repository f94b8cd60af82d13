"""Runs an exported decoder under onnxruntime: states are held as OrtValues and handed from step to step uncopied."""

import ctypes
import math
import os
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from compress.errors import InputError, WorkError, first_line, is_out_of_memory
from compress.parallel import slices
from compress.runtime import graph_names, memory
from compress.runtime.onnx_files import open_session

# what onnxruntime says on stderr by itself: nothing, since whatever fails is told in a sentence (3: errors, 4: fatal ones)
LOG_LEVEL = 3 if os.environ.get("COMPRESS_TRACEBACK") else 4
ort.set_default_logger_severity(LOG_LEVEL)

# of states: numpy's type of as many bytes, whose zeros are the same, and ONNX's own
ELEMENTS = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
    "tensor(float8e4m3fn)": (np.uint8, 17),
    "tensor(int8)": (np.int8, 3),
    "tensor(uint8)": (np.uint8, 2),
}
TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
}
CALL_LOGIT_BYTES = 256 << 20  # of the logits of one call, since a graph gives those of all its tokens
CALL_TOKENS = 2048  # and in attention each of them meets all that were read before
LOAD_FACTOR = 3.0  # peak memory of a session over the artifact's bytes: 2.7 measured (benchmarks/RESULTS.md), for prepacked copies


class OnnxSession:
    """A loaded model.onnx with the contract's inputs and outputs. `options` are session options by name."""

    def __init__(self, path: Path, options: dict[str, str] | None = None, threads: int = 0):
        _refuse_too_large(path)
        self._path, settings = path, ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = LOG_LEVEL
        for key, value in (options or {}).items():
            settings.add_session_config_entry(key, value)
        try:
            self._session = open_session(path, settings)
        except InputError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            if is_out_of_memory(error):
                raise WorkError(f"{path}: memory ran out while loading it") from None
            raise InputError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        inputs = {value.name: value for value in self._session.get_inputs()}
        self.past = {name: value for name, value in inputs.items() if graph_names.is_past(name)}
        outputs = {value.name: value for value in self._session.get_outputs()}
        _refuse_foreign(path, inputs.keys() - self.past.keys(), self.past, outputs)
        self.vocab_size = int(outputs["logits"].shape[-1])

    def state_bytes(self, tokens: int) -> int:
        """Of what is kept of one sequence after so many tokens."""
        shapes = {
            name: [size if isinstance(size, int) else tokens for size in value.shape[1:]]
            for name, value in self.past.items()
        }
        return sum(math.prod(shape) * TORCH_TYPES[self.past[name].type].itemsize for name, shape in shapes.items())

    def start(self, batch: int) -> "Generation":
        return Generation(self, batch)

    def run(self, outputs: list[str], feeds: dict[str, ort.OrtValue]) -> list[ort.OrtValue]:
        """Raises InputError for a graph that loads and then fails: shapes and data that do not belong together."""
        options = ort.RunOptions()
        options.log_severity_level = LOG_LEVEL
        try:
            found: list[ort.OrtValue] = self._session.run_with_ort_values(outputs, feeds, options)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise WorkError(f"{self._path}: memory ran out while running it") from None
            raise InputError(f"{self._path}: onnxruntime fails while running it ({first_line(error)})") from None
        return found


class Generation:
    """One batch of sequences: `step` feeds [B, S] more tokens and returns their logits [B, S, V]."""

    def __init__(self, session: OnnxSession, batch: int):
        self._session, self._seen = session, np.ones((batch, 0), np.int64)
        self._outputs = ["logits", *map(graph_names.present_of, session.past)]
        self._state = {name: _empty(value, batch) for name, value in session.past.items()}

    def step(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """`attention_mask` [B, S] is 0 for left padding among the new tokens; all are tokens by default."""
        new = np.ones(ids.shape, np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        self._seen = np.concatenate([self._seen, new], 1)
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids, np.int64)),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(self._seen),
            **self._state,
        }
        logits, *present = self._session.run(self._outputs, feeds)
        self._state = dict(zip(self._state, present, strict=True))
        values: np.ndarray = logits.numpy()
        return values

    def calls(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Where each call starts and stops that reads so many tokens of every sequence within bounded memory."""
        fitting = CALL_LOGIT_BYTES // (4 * self._session.vocab_size * len(self._seen))
        return ((piece.start, piece.stop) for piece in slices(tokens, max(1, min(CALL_TOKENS, fitting))))

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Feeds [B, S] more tokens in as many calls, and returns the logits [B, V] after the last."""
        for start, stop in self.calls(ids.shape[1]):
            last = self.step(ids[:, start:stop])[:, -1].copy()
        return last

    def states(self) -> dict[str, torch.Tensor]:
        """What is kept, by name of the input it comes in by, in the type it is stored in: views, until the next step."""
        return {name: _view(value, self._session.past[name].type) for name, value in self._state.items()}


class OnnxDecoder:
    """`step(ids [B, S])` returns the last logits [B, V]: the tensors-only view that generation shares with checkpoints."""

    def __init__(self, generation: Generation):
        self._generation = generation

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._generation.read(ids.numpy()))


def _empty(value: ort.NodeArg, batch: int) -> ort.OrtValue:
    """The empty past of one input: batch in the first dimension, a past of length 0 where that is dynamic, zeros."""
    shape = [batch] + [size if isinstance(size, int) else 0 for size in value.shape[1:]]
    held_as, element = ELEMENTS[value.type]
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, held_as), element)


def _view(value: ort.OrtValue, type_name: str) -> torch.Tensor:
    """numpy knows neither bfloat16 nor fp8, torch does."""
    dtype, shape = TORCH_TYPES[type_name], value.shape()
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw = (ctypes.c_byte * size).from_address(value.data_ptr())
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def _refuse_foreign(
    path: Path, others: Set[str], past: dict[str, ort.NodeArg], outputs: dict[str, ort.NodeArg]
) -> None:
    """A graph of another tool, or a damaged one: it would fail later, and less clearly."""
    missing = {"logits", *map(graph_names.present_of, past)} - outputs.keys()
    states = [name for name, value in past.items() if value.type not in ELEMENTS or not value.shape]
    if others != {"input_ids", "attention_mask"}:
        problem = "expected the inputs input_ids and attention_mask, and past_key_values"
    elif missing:
        problem = f"the output '{min(missing)}' is missing"
    elif not outputs["logits"].shape or not isinstance(outputs["logits"].shape[-1], int):
        problem = "its logits do not say how large the vocabulary is"
    elif states:
        problem = f"the state '{states[0]}' is {past[states[0]].type} {past[states[0]].shape}"
    else:
        return
    raise InputError(f"{path}: not a decoder this tool exports; {problem}")


def _refuse_too_large(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    parts = (part for part in path.parent.iterdir() if part.name.startswith(path.name) and part.is_file())
    size = sum(part.stat().st_size for part in parts)
    memory.refuse_beyond(path, size * LOAD_FACTOR)
