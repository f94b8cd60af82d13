"""The scan of Mamba-1, without a loop over tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compress import parallel

SCAN_BLOCK_ELEMENTS = 1 << 22  # float32 elements of [B, chunks, N, channels] worked on at a time (16 MiB)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, recurrent_state: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t b_t x_t,  y_t = c_t . h_t + d x_t   (Mamba, eq. 2 with the zero-order hold on A).

    Returns y [B, S, D] and the state after the last token. No loop over tokens: the length is cut into about sqrt(S)
    chunks whose recurrences run side by side, first from zero to find what each chunk hands on, then, with the carries
    chained, again from the right start. That is about 3 sqrt(S) vectorised steps. Every factor is exp of a negative
    number, so nothing overflows. Channels go in blocks, so memory does not grow with D.
    """
    batch, length, channels = x.shape
    chunk = math.ceil(math.sqrt(length))
    chunks = math.ceil(length / chunk)
    width = max(1, SCAN_BLOCK_ELEMENTS // (batch * chunks * a.shape[0]))

    def scan(start: int) -> tuple[Tensor, Tensor]:
        block = slice(start, start + width)
        return _scan_block(x[..., block], dt[..., block], a[:, block], b, c, recurrent_state[..., block], chunk)

    outputs, states = zip(*parallel.each(scan, range(0, channels, width)), strict=True)
    return torch.cat(outputs, -1) + d * x, torch.cat(states, -1)


def _scan_block(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    # padding at the end has dt = 0: decay 1, input 0, so the state passes through it unchanged
    fed, dt, b, c = (_chunked(tensor, chunk) for tensor in (dt * x, dt, b, c))
    state = _chunk_starts(fed, dt, a, b, start, chunk)
    y = torch.empty_like(fed)
    for t in range(chunk):
        state = _advance(state, fed, dt, a, b, t)
        y[:, :, t] = (c[:, :, t].unsqueeze(2) @ state).squeeze(2)
    return y.flatten(1, 2)[:, :length], state[:, -1]


def _chunk_starts(fed: Tensor, dt: Tensor, a: Tensor, b: Tensor, start: Tensor, chunk: int) -> Tensor:
    """The state each chunk begins with, [B, chunks, N, D]."""
    starts, chunks = [start], fed.shape[1]
    if chunks > 1:
        local = torch.zeros(fed.shape[0], chunks, *a.shape, dtype=fed.dtype, device=fed.device)
        for t in range(chunk):
            local = _advance(local, fed, dt, a, b, t)
        decay = torch.exp(dt.sum(2, keepdim=True) * a)  # over a whole chunk
        for i in range(chunks - 1):
            starts.append(decay[:, i] * starts[-1] + local[:, i])
    return torch.stack(starts, 1)


def _chunked(tensor: Tensor, chunk: int) -> Tensor:
    """[B, S, X] -> [B, chunks, chunk, X], zero-padded at the end."""
    padding = -tensor.shape[1] % chunk
    chunked: Tensor = F.pad(tensor, (0, 0, 0, padding)).unflatten(1, (-1, chunk))
    return chunked


def _advance(state: Tensor, fed: Tensor, dt: Tensor, a: Tensor, b: Tensor, t: int) -> Tensor:
    """One step of every chunk: state [B, chunks, N, D]."""
    decay = torch.exp(dt[:, :, t].unsqueeze(2) * a)
    return torch.addcmul(decay * state, b[:, :, t].unsqueeze(3), fed[:, :, t].unsqueeze(2))
