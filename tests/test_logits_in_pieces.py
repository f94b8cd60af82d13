"""Logits of long windows: never more than a bounded stretch of positions together, and still those of the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jamba_models import load_reference

from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.recipe.check import PHASES
from compress.runtime import onnx_session, pieces
from compress.runtime.artifacts import open_artifact
from compress.runtime.candidates import CheckpointCandidate, OnnxCandidate
from compress.runtime.inference import Head
from compress.runtime.onnx_session import OnnxSession

VOCABULARY = 67
ROW = 4 * VOCABULARY  # bytes of the logits of a position
LENGTHS = (23, 23, 12, 2)


@pytest.fixture(scope="module")
def float_onnx(small, tmp_path_factory) -> Path:
    return exporting.export_checkpoint(small, "onnx", tmp_path_factory.mktemp("float") / "onnx") / "model.onnx"


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def called(monkeypatch) -> list[int]:
    """Positions whose logits each call of a graph gave, over all sequences, with room for those of five."""
    monkeypatch.setattr(onnx_session, "CALL_LOGIT_BYTES", 5 * ROW)
    seen, run = list[int](), OnnxSession.run

    def counting(self, outputs, feeds):
        seen.append(int(np.prod(feeds["input_ids"].shape())))
        return run(self, outputs, feeds)

    monkeypatch.setattr(OnnxSession, "run", counting)
    return seen


def assert_are_the_model_s(found, small: Path, windows: list[torch.Tensor], first: int = 0) -> None:
    reference = load_reference(small)
    for number, window in enumerate(windows):
        of_window = sorted((piece for piece in found if piece[0] == number), key=lambda piece: piece[1])
        expected = reference(window[None]).logits[0, first:-1]
        assert [start + i for _, start, rows in of_window for i in range(len(rows))] == list(
            range(first, len(window) - 1)
        )
        if of_window:
            assert (torch.cat([rows for _, _, rows in of_window]) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("prefill", [0, 9])
@pytest.mark.parametrize("phase", PHASES)
def test_a_window_of_more_logits_than_a_call_may_give_is_read_in_several(
    small, float_onnx, windows, called, monkeypatch, phase, prefill
):
    monkeypatch.setattr("compress.runtime.candidates.LOGIT_BYTES", 5 * ROW)
    found = list(OnnxCandidate(float_onnx, prefill=prefill).logits(windows, phase, lambda tokens: None))
    assert_are_the_model_s(found, small, windows, prefill if phase == "decode" else 0)
    assert max(called) <= (5 if phase == "prefill" or prefill else len(windows))
    if phase == "prefill":
        assert called == [5, 5, 5, 5, 3] * 2 + [5, 5, 2] + [2]


def test_a_call_has_a_largest_number_of_tokens_whatever_the_vocabulary(small, float_onnx, windows, called, monkeypatch):
    monkeypatch.setattr(onnx_session, "CALL_LOGIT_BYTES", 1 << 30)
    monkeypatch.setattr(onnx_session, "CALL_TOKENS", 8)
    found = list(OnnxCandidate(float_onnx).logits(windows[:1], "prefill", lambda tokens: None))
    assert called == [8, 8, 7]
    assert_are_the_model_s(found, small, windows[:1])


def test_a_long_prompt_is_read_in_several_calls_before_text_goes_on(small, float_onnx, windows, called):
    together = torch.stack(windows[:2])
    last = open_artifact(float_onnx).steps(2).step(together)
    expected = load_reference(small)(together).logits[:, -1]
    assert (last - expected).abs().max() < 1e-3
    assert called == [2 * 2] * 11 + [2]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_no_piece_holds_more_memory_than_it_may(small, float_onnx, windows, monkeypatch, kind, phase):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * ROW)
    candidate = CheckpointCandidate(Checkpoint(small).model) if kind == "checkpoint" else OnnxCandidate(float_onnx)
    found = list(candidate.logits(windows, phase, lambda tokens: None))
    assert max(rows.untyped_storage().nbytes() for _, _, rows in found) == 4 * ROW
    assert_are_the_model_s(found, small, windows)


def test_the_output_matrix_meets_few_positions_at_a_time(small, windows, monkeypatch):
    monkeypatch.setattr(pieces, "HEAD_BYTES", 6 * ROW)
    given, call = list[int](), Head.__call__

    def counting(self, hidden):
        given.append(len(hidden))
        return call(self, hidden)

    monkeypatch.setattr(Head, "__call__", counting)
    found = list(CheckpointCandidate(Checkpoint(small).model).logits(windows, "prefill", lambda tokens: None))
    assert given == [6, 6, 6, 4] * 2 + [6, 5] + [1]
    assert_are_the_model_s(found, small, windows)


def test_one_position_is_a_piece_however_large_its_logits(monkeypatch):
    assert pieces.rows_within(16 << 20, 256 << 20) == 1


@pytest.mark.parametrize(("room", "together"), [(1 << 30, 5), (3, 3), (0, 1)])
def test_as_many_windows_are_decoded_side_by_side_as_their_states_fit(
    small, float_onnx, called, monkeypatch, room, together
):
    """`room` is for so many sequences, twice, of 12 tokens: an attention layer of one KV head of 8, five of Mamba, float32."""
    states = 4 * (2 * 12 * 8 + 5 * 80 * (7 + 3))
    monkeypatch.setattr("compress.runtime.candidates.kept_bytes", lambda device: 2 * states * room)
    windows = [torch.arange(3 + first, 15 + first) for first in range(5)]
    found = list(OnnxCandidate(float_onnx).logits(windows, "decode", lambda tokens: None))
    assert max(called) == together
    assert_are_the_model_s(found, small, windows)
