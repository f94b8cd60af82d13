"""Where a router cannot tell experts apart, the lower number goes first, in our forward, in the ONNX graph and in
`compress.load` alike: else two artifacts of one model send a token to different experts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jamba_models import make_jamba
from safetensors.torch import load_file, save_file

import compress
from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.model import routing
from compress.model.routing import Router
from compress.runtime.inference import Head, stream
from compress.runtime.onnx_session import OnnxSession

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
AGREEMENT = 1e-3  # between logits: another expert moves them by more than 1
EXPERTS = 11  # a width at which float32 products sum some columns in another order than others
SHAPES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5, "num_experts": EXPERTS}
LENGTHS = (1, 7, 13, 61)


def all_equal(router: torch.Tensor) -> torch.Tensor:
    return router[:1].expand_as(router)


def pairs(router: torch.Tensor) -> torch.Tensor:
    """Row e equals row E - 1 - e, so that with an odd k the border of the top-k runs through a pair."""
    return torch.where(torch.arange(EXPERTS)[:, None] < EXPERTS // 2, router, router.flip(0))


def zeros(router: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(router)


TIES = {"all rows equal": all_equal, "rows equal in pairs": pairs, "zeros": zeros}


def change(folder: Path, part: str, new) -> None:
    """Replaces every tensor whose name holds `part` by new(name, tensor)."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: new(name, t).to(t.dtype).contiguous() if part in name else t for name, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


class Tied:
    """A model whose routers tie, its export, and what our own forward computes."""

    def __init__(self, folder: Path, top_k: int, tie):
        self.source = make_jamba(folder / "source", spread=0.7, num_experts_per_tok=top_k, **SHAPES)
        change(self.source, "router", lambda _, router: tie(router))
        self.refresh(folder / "onnx")
        self.scratch = folder

    def refresh(self, out: Path) -> None:
        self.model = Checkpoint(self.source).model
        exporting.export_checkpoint(self.source, "onnx", out)
        self.session = OnnxSession(out / "model.onnx", EXACT, threads=1)

    def own_logits(self, ids: np.ndarray) -> np.ndarray:
        blocks = stream(self.model, list(torch.from_numpy(ids)), self.scratch)
        return np.concatenate([Head(self.model, "cpu")(hidden).numpy() for _, hidden in blocks])


@pytest.fixture(
    scope="module", params=[(k, tie) for k in (1, 2, 3) for tie in TIES], ids=lambda p: f"{p[1]}, top {p[0]}"
)
def tied(request, tmp_path_factory) -> Tied:
    top_k, tie = request.param
    return Tied(tmp_path_factory.mktemp("tied"), top_k, TIES[tie])


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 67, (batch, length))


def assert_agrees(actual: np.ndarray, expected: np.ndarray):
    assert np.abs(actual - expected).max() <= AGREEMENT


@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_chooses_the_experts_that_the_checkpoint_chooses(tied, batch):
    for length in LENGTHS:
        ids = tokens(batch, length)
        assert_agrees(tied.session.start(batch).step(ids), tied.own_logits(ids))


def test_it_does_so_token_by_token(tied):
    ids = tokens(3, 13)
    generation = tied.session.start(3)
    pieces = [generation.step(piece).copy() for piece in np.split(ids, [5, *range(6, 13)], axis=1)]
    assert_agrees(np.concatenate(pieces, 1), tied.own_logits(ids))


def test_a_loaded_model_does_so_too(tied):
    model, ids = compress.load(tied.source), tokens(3, 61)
    with torch.no_grad():
        assert_agrees(model(torch.from_numpy(ids), use_cache=False).logits.numpy(), tied.own_logits(ids))


def test_with_a_router_of_zeros_only_the_first_experts_count(tmp_path):
    """Everything but experts 0 and 1 is made huge: nothing may change."""
    tied, ids = Tied(tmp_path, 2, zeros), tokens(3, 13)
    before = tied.session.start(3).step(ids)
    first = (".experts.0.", ".experts.1.")
    change(tied.source, ".experts.", lambda name, t: t if any(part in name for part in first) else t * 1e4)
    tied.refresh(tmp_path / "again")
    assert np.array_equal(tied.session.start(3).step(ids), before)
    assert_agrees(tied.own_logits(ids), before)


@pytest.mark.parametrize("experts", [2, 3, 5, 8, 11, 16, 19])
@pytest.mark.parametrize("width", [40, 64, 1000])
def test_equal_rows_of_a_router_give_equal_logits_whatever_their_place(experts, width):
    g = torch.Generator().manual_seed(experts)
    row = torch.randn(width, generator=g)
    for count in (1, 2, 7, 64):
        logits = routing.logits(torch.randn(count, width, generator=g), row.expand(experts, width))
        assert torch.equal(logits, logits[:, :1].expand_as(logits))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_of_equal_logits_the_lower_number_is_chosen(top_k):
    """Logits of three values only, so that most tokens tie; numpy's stable sort is the reference."""
    logits = np.random.default_rng(0).integers(0, 3, (50, EXPERTS)).astype(np.float32)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    assert np.array_equal(routing.choose(torch.from_numpy(logits), top_k).numpy(), expected)


def test_logits_whose_softmax_is_equal_are_told_apart_and_removed_rows_are_not_chosen():
    """Two logits a float32 apart at 1e-6 have one probability; the greater goes first. The fourth row has no expert."""
    close = np.nextafter(np.float32(1e-6), np.float32(1))
    gates = Router("router", 4, 1).gates(torch.tensor([[1e-6, close, -1.0, 5.0]]), 3)
    assert gates[0, 1] > 0 and gates[0, [0, 2]].eq(0).all()
