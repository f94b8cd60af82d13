"""Runs a model that may be larger than memory: layer by layer over many windows, or token by token.

Both ways touch one layer at a time, and inside it one expert, unless what was read fits into a stated budget.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from compress import parallel
from compress.arithmetic.norm import rms_norm
from compress.disk import files
from compress.errors import InputError
from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.weight import Unit, is_finite
from compress.runtime import memory
from compress.runtime.eager import Eager
from compress.runtime.kept import Kept, Listen

CACHE_BYTES = 512 << 20  # of float32 weights of a layer kept between blocks; beyond that they are read again
SHARE = 4  # of a layer that is streamed, one in so many bytes of free memory instead
BLOCK_TOKENS = 4096  # tokens whose hidden states are in memory together, in prefill
DECODE_TOKENS = 32768  # the same in decode, where a step holds one token of each window
TINY = torch.finfo(torch.float32).tiny  # of temperatures: below it, all the same
EMBEDDING_ROWS = 256  # rows read together where a few of a large embedding are needed

Advance = Callable[[int], None]
Tap = Callable[[str, torch.Tensor], None]
Cuts = Callable[[int], Iterable[tuple[int, int]]]  # tokens of a window -> where each call starts and stops


class LayerWeights:
    """Weights of one unit as float32 on `device`, by name within the unit; keeps what fits into `budget` bytes.

    `tap(name, x)` hears of every input of a matrix, before it is rounded.
    """

    def __init__(self, unit: Unit, prefix: str, device: str, budget: int = CACHE_BYTES, tap: Tap | None = None):
        self._unit, self._prefix, self._device, self._room, self._tap = unit, prefix, device, budget, tap
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._unit.weights[self._prefix + name].dense().to(self._device)
        if tensor.nbytes <= self._room:
            self._kept[name] = tensor
            self._room -= tensor.nbytes
        return tensor

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._tap is not None:
            self._tap(name, x)
        return parallel.linear(self._unit.weights[self._prefix + name].rounded_input(x), self(name), bias)


def kept_bytes(device: str) -> int:
    """Of float32 weights, which a decoded token would have read from disk again."""
    return memory.available() // SHARE if device == "cpu" else CACHE_BYTES


def layer_weights(model: HybridModel, index: int, device: str, budget: int = CACHE_BYTES) -> LayerWeights:
    return LayerWeights(model.unit(f"layer.{index}"), model.layer(index).prefix, device, budget)


def empty_state(layer: Layer, batch: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The past of a layer before the first token."""
    return {spec.name: spec.empty(batch, device) for spec in layer.carried}


def embed(model: HybridModel, ids: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Token ids [...] -> hidden states [..., H]; reads only the blocks of rows that are asked for."""
    weight = model.embedding
    wanted, places = torch.unique(ids, return_inverse=True)
    table = torch.empty(len(wanted), weight.shape[1])
    for block in torch.unique(wanted // EMBEDDING_ROWS).tolist():
        start = block * EMBEDDING_ROWS
        rows = weight.dense(slice(start, min(start + EMBEDDING_ROWS, weight.shape[0])))
        inside = wanted // EMBEDDING_ROWS == block
        table[inside] = rows[wanted[inside] - start]
    return table[places].to(device)


class Head:
    """Final norm and output matrix: hidden states [..., H] -> logits [..., V], the matrix in blocks of rows."""

    def __init__(self, model: HybridModel, device: str, budget: int = CACHE_BYTES):
        self._norm = model.final_norm.dense().to(device)
        self._eps, self._weight, self._device = model.config.rms_norm_eps, model.output_matrix, device
        self.vocab_size = self._weight.shape[0]
        keep = 4 * self._weight.parameters <= budget
        self._blocks = [(rows, self._rows(rows) if keep else None) for rows in self._weight.row_blocks()]

    def _rows(self, rows: slice) -> torch.Tensor:
        return self._weight.dense(rows).to(self._device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = rms_norm(hidden, self._norm, self._eps)
        hidden = self._weight.rounded_input(hidden)
        logits = torch.empty(*hidden.shape[:-1], self._weight.shape[0], device=self._device)

        def fill(block: tuple[slice, torch.Tensor | None]) -> None:
            rows, kept = block
            logits[..., rows] = hidden @ (self._rows(rows) if kept is None else kept).T

        parallel.each(fill, self._blocks)
        return logits


def blocks_of(windows: list[torch.Tensor], tokens: int) -> list[list[int]]:
    """Indices of consecutive windows of equal length that are computed together, about `tokens` tokens each."""
    blocks: list[list[int]] = []
    for i, window in enumerate(windows):
        room = max(1, tokens // len(window))
        if blocks and len(windows[blocks[-1][0]]) == len(window) and len(blocks[-1]) < room:
            blocks[-1].append(i)
        else:
            blocks.append([i])
    return blocks


class HiddenStates:
    """Hidden states of many windows between two layers, on disk by block of windows."""

    def __init__(self, folder: Path, windows: list[torch.Tensor], hidden_size: int, tokens: int = BLOCK_TOKENS):
        self.folder, self.blocks = folder, blocks_of(windows, tokens)
        self.shapes = [(len(block), len(windows[block[0]]), hidden_size) for block in self.blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def at(self, folder: Path) -> "HiddenStates":
        """The same blocks in another folder, which is made."""
        other = copy.copy(self)
        other.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        return other

    def of_width(self, width: int) -> "HiddenStates":
        """The same blocks, in the same folder, of tensors of another width."""
        other = copy.copy(self)
        other.shapes = [(windows, length, width) for windows, length, _ in self.shapes]
        return other

    def read(self, number: int) -> torch.Tensor:
        """Block `number`, float32 [b, S, H]; copied, as torch aligns what it allocates: no digit depends on chance."""
        return torch.from_numpy(np.fromfile(self._file(number), dtype=np.float32)).view(self.shapes[number]).clone()

    def read_all(self) -> Iterator[torch.Tensor]:
        """Every block in order."""
        return map(self.read, range(len(self)))

    def write(self, number: int, hidden: torch.Tensor) -> None:
        with files.writing(self._file(number)), open(self._file(number), "wb") as file:
            file.write(hidden.contiguous().cpu().numpy().data)

    def flush(self) -> None:
        """Makes sure that what was written survives a loss of power: a journal will say that it is there."""
        files.sync_tree(self.folder)

    def remove(self, number: int) -> None:
        self._file(number).unlink()

    def _file(self, number: int) -> Path:
        return self.folder / f"hidden-{number:05d}.f32"


def embed_windows(model: HybridModel, windows: list[torch.Tensor], states: HiddenStates) -> None:
    for number, block in enumerate(states.blocks):
        states.write(number, embed(model, torch.stack([windows[i] for i in block])))


def in_one_call(length: int) -> Iterator[tuple[int, int]]:
    yield 0, length


def calls(length: int, prefill: int) -> Iterator[tuple[int, int]]:
    """Where each call starts and stops that decodes so many tokens, after the first `prefill` (at least one) together."""
    first = min(length, max(1, prefill))
    yield 0, first
    yield from ((t, t + 1) for t in range(first, length))


ONE_BY_ONE = partial(calls, prefill=1)


@torch.inference_mode()
def stream(model: HybridModel, windows: list[torch.Tensor], scratch: Path, *, device: str = "cpu",
           decode: bool = False, prefill: int = 1, advance: Advance = lambda tokens: None,
           cuts: Cuts = in_one_call, listen: Listen | None = None) -> Iterator[tuple[list[int], torch.Tensor]]:  # fmt: skip
    """Yields (window indices, final hidden states [b, S, H]) for blocks of windows, weights read once per layer and block.

    Hidden states wait on disk under `scratch` between layers. With `decode`, every layer takes its tokens one at a
    time, but the first `prefill` in one call, and carries its state, as in generation: what rounds or drifts there shows.
    Otherwise `cuts` says where calls begin and end. `advance` hears of tokens x layers, `listen` of what every layer keeps at
    the end of each call.
    """
    tokens = _decoded_together(max(map(len, windows)), prefill) if decode else BLOCK_TOKENS
    cuts = partial(calls, prefill=prefill) if decode else cuts
    states = HiddenStates(scratch, windows, model.config.hidden_size, tokens)
    embed_windows(model, windows, states)
    for index in range(model.config.num_hidden_layers):
        weights = layer_weights(model, index, device, kept_bytes(device))
        run_layer(model, index, weights, states, states, device, advance, cuts=cuts, listen=listen)
    del weights  # what is yielded takes memory too
    for number, block in enumerate(states.blocks):
        yield block, states.read(number).to(device)
        states.remove(number)


def _decoded_together(longest: int, prefill: int) -> int:
    """Tokens of windows that are decoded side by side: a prompt takes as much memory as in prefill."""
    return min(DECODE_TOKENS, longest * max(1, BLOCK_TOKENS // max(1, prefill)))


def run_layer(model: HybridModel, index: int, weights: LayerWeights, entering: HiddenStates, leaving: HiddenStates,
              device: str, advance: Advance, *, cuts: Cuts = in_one_call, listen: Listen | None = None) -> None:  # fmt: skip
    """One layer, block by block; `leaving` may be `entering`. `advance` hears of tokens."""
    for number, windows in enumerate(entering.blocks):
        hidden = entering.read(number).to(device)
        leaving.write(number, _run_block(model, index, weights, hidden, cuts, windows, listen))
        advance(hidden.shape[0] * hidden.shape[1])


def decode_layer(model: HybridModel, index: int, weights: LayerWeights, entering: HiddenStates, leaving: HiddenStates,
                 device: str, advance: Advance) -> None:  # fmt: skip
    """One layer, token by token, on blocks that are small enough for prefill: as many together as decode takes."""
    for numbers in _decoded_blocks(entering):
        blocks = [entering.read(number) for number in numbers]
        hidden = torch.cat(blocks).to(device)
        windows = [window for number in numbers for window in entering.blocks[number]]
        pieces = _run_block(model, index, weights, hidden, ONE_BY_ONE, windows).split([len(block) for block in blocks])
        for number, piece in zip(numbers, pieces, strict=True):
            leaving.write(number, piece)
        advance(hidden.shape[0] * hidden.shape[1])


def _decoded_blocks(states: HiddenStates) -> Iterator[list[int]]:
    """Consecutive blocks of windows of equal length, DECODE_TOKENS at most together; at least one."""
    together: list[int] = []
    for number, (windows, length, _) in enumerate(states.shapes):
        tokens = sum(states.shapes[other][0] for other in together) * length + windows * length
        if together and (states.shapes[together[0]][1] != length or tokens > DECODE_TOKENS):
            yield together
            together = []
        together.append(number)
    yield together


def _run_block(model: HybridModel, index: int, weights: LayerWeights, hidden: torch.Tensor, cuts: Cuts,
               windows: list[int], listen: Listen | None = None) -> torch.Tensor:  # fmt: skip
    """One layer on hidden states [b, S, H] of these windows, call by call."""
    layer, length = model.layer(index), hidden.shape[1]
    state = empty_state(layer, hidden.shape[0], hidden.device)
    outputs = []
    for start, stop in cuts(length):
        output, state = layer.run(Eager(weights, total=stop), hidden[:, start:stop], state)
        outputs.append(output)
        if listen is not None:
            listen(Kept(layer, windows, stop, length, state, weights))
    return torch.cat(outputs, 1)


def fits_in_memory(model: HybridModel) -> bool:
    """Whether its weights, as float32, take at most half of what is free."""
    return bool(4 * model.parameters <= memory.available() // 2)


class Decoder:
    """Token-by-token inference with the states held between steps. `step(ids [B, S])` returns the last logits [B, V].

    Weights stay in memory where they fit; otherwise every step reads them again, layer by layer, which is slow but bounded.
    """

    def __init__(self, model: HybridModel, batch: int = 1, device: str = "cpu"):
        self._model, self._device = model, device
        self._budget = 4 * model.parameters if fits_in_memory(model) else 0
        layers = range(model.config.num_hidden_layers)
        self._weights = [layer_weights(model, i, device, self._budget) for i in layers]
        self._states = [empty_state(layer, batch, device) for layer in model.layers]
        self._head = Head(model, device, self._budget)
        self._read = 0

    @torch.inference_mode()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = embed(self._model, ids, self._device)
        self._read += ids.shape[1]
        for index, weights in enumerate(self._weights):
            ops = Eager(weights, total=self._read)
            hidden, self._states[index] = self._model.layer(index).run(ops, hidden, self._states[index])
        return self._head(hidden[:, -1])


def sample(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Next tokens [B] from logits [B, V]: the most likely at temperature 0, else drawn from softmax(logits / T)."""
    if not is_finite(logits):
        raise InputError("the model gives logits that are NaN or infinite: no text can be sampled from it")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float().cpu()
    below = logits - logits.amax(-1, keepdim=True)  # 0 at most, so that no temperature makes infinity of it
    probabilities = torch.softmax(below / max(temperature, TINY), dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
