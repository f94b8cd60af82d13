"""The arithmetic of hybrid models as plain functions on float32 tensors.

Glossary (letters of the Mamba paper, arXiv 2312.00752, in brackets)

    B   batch               S   tokens given now          T   past + S, all tokens attended to
    H   hidden_size         F   intermediate_size         E   num_experts      R   rows of the router, E or more
    D   d_inner             N   d_state                   W   d_conv, the convolution's width
    Q   query heads         G   key-value heads           P   head_dim

    x   [B, S, D]    input of the scan                    (u or x)
    dt  [B, S, D]    time step, after softplus, > 0       (Delta)
    a   [N, D]       continuous-time decay, < 0           (A, transposed)
    b   [B, S, N]    input matrix                         (B)
    c   [B, S, N]    output matrix                        (C)
    d   [D]          skip connection                      (D)

    conv_state       [B, D, W - 1]    the last inputs of the convolution
    recurrent_state  [B, N, D]        h, the scan's hidden state
    key, value       [B, G, T, P]

`mask` is 1 for tokens and 0 for padding, [B, S] over the new tokens or [B, T] over all: padding leaves every state as it was.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from compress import parallel

Linear = Callable[[torch.Tensor], torch.Tensor]  # applies one matrix
SCAN_BLOCK_ELEMENTS = 1 << 22  # float32 elements of [B, chunks, N, channels] worked on at a time (16 MiB)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467)."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def swiglu(x: torch.Tensor, gate: Linear, up: Linear, down: Linear) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202). x [..., H]; gate and up give [..., F], down [..., H]."""
    return down(swiglu_hidden(x, gate, up))


def swiglu_hidden(x: torch.Tensor, gate: Linear, up: Linear) -> torch.Tensor:
    """silu(gate(x)) * up(x), [..., F]."""
    return F.silu(gate(x)) * up(x)


def causal_conv(x: torch.Tensor, conv_state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask=None):
    """Depthwise causal convolution over time. x [B, S, D], weight [D, 1, W] -> y [B, S, D], new conv_state.

    The state is that after the last token: padding may stand before the tokens or after them, and x is 0 there.
    """
    padded = torch.cat([conv_state, x.transpose(1, 2)], dim=2)  # [B, D, W - 1 + S]
    y = F.conv1d(padded, weight, bias, groups=weight.shape[0])
    kept = weight.shape[2] - 1
    if mask is None:
        return y.transpose(1, 2), padded[:, :, -kept:].contiguous()
    last = (mask * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1)  # tokens up to the last real one, [B]
    newest = (last[:, None] + torch.arange(kept, device=x.device)).long()
    return y.transpose(1, 2), padded.gather(2, newest[:, None].expand(-1, padded.shape[1], -1))


def selective_scan(x, dt, a, b, c, d, recurrent_state):
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

    def scan(start: int):
        block = slice(start, start + width)
        return _scan_block(x[..., block], dt[..., block], a[:, block], b, c, recurrent_state[..., block], chunk)

    outputs, states = zip(*parallel.each(scan, range(0, channels, width)), strict=True)
    return torch.cat(outputs, -1) + d * x, torch.cat(states, -1)


def _scan_block(x, dt, a, b, c, start, chunk: int):
    length = x.shape[1]
    # padding at the end has dt = 0: decay 1, input 0, so the state passes through it unchanged
    fed, dt, b, c = (_chunked(tensor, chunk) for tensor in (dt * x, dt, b, c))
    state = _chunk_starts(fed, dt, a, b, start, chunk)
    y = torch.empty_like(fed)
    for t in range(chunk):
        state = _advance(state, fed, dt, a, b, t)
        y[:, :, t] = (c[:, :, t].unsqueeze(2) @ state).squeeze(2)
    return y.flatten(1, 2)[:, :length], state[:, -1]


def _chunk_starts(fed, dt, a, b, start, chunk: int):
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


def _chunked(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, S, X] -> [B, chunks, chunk, X], zero-padded at the end."""
    padding = -tensor.shape[1] % chunk
    return F.pad(tensor, (0, 0, 0, padding)).unflatten(1, (-1, chunk))


def _advance(state, fed, dt, a, b, t: int):
    """One step of every chunk: state [B, chunks, N, D]."""
    decay = torch.exp(dt[:, :, t].unsqueeze(2) * a)
    return torch.addcmul(decay * state, b[:, :, t].unsqueeze(3), fed[:, :, t].unsqueeze(2))


def attention(query, key, value, mask: torch.Tensor | None):
    """Causal attention with grouped key-value heads and no positional encoding (Jamba, arXiv 2403.19887).

    query [B, Q, S, P]; key, value [B, G, T, P] with the S newest tokens last; mask [B, T] or None. -> [B, Q, S, P].
    """
    length, total = query.shape[2], key.shape[2]
    if mask is None and length in (1, total):
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=True)
    row = torch.arange(total - length, total, device=query.device)[:, None]
    column = torch.arange(total, device=query.device)
    allowed = (column <= row)[None]
    if mask is not None:
        # a padded query attends to itself: its output is never used, but must not be NaN
        allowed = allowed & (mask.bool()[:, None] | (column == row)[None])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], enable_gqa=True)


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [..., H], router [R, H] -> [..., R], equal where rows are.

    Summed in float64: a float32 product sums some columns in another order than others, so that equal rows differ in the
    last bit and a tie is decided by noise. The router is so small that this takes no time.
    """
    return F.linear(x.double(), router.double()).to(x.dtype)


def choose_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """logits [..., E] -> the numbers of the top_k largest, [..., top_k], of equal ones the lower number first.

    So ONNX defines its TopK. torch.topk leaves the order of equals open. Logits decide, not their softmax, in which other
    ones become equal.
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def gates(logits: torch.Tensor, top_k: int, experts: int) -> torch.Tensor:
    """Softmax over all rows of the router, then the top-k of the experts, not renormalised (Jamba).

    logits [..., R], the experts' rows first (rows after them belong to experts that were removed and only stay in the
    denominator) -> [..., E], zero for experts a token does not go to.
    """
    probabilities = torch.softmax(logits, dim=-1)[..., :experts]
    chosen = choose_experts(logits[..., :experts], top_k)
    return torch.zeros_like(probabilities).scatter_(-1, chosen, probabilities.gather(-1, chosen))


def moe(x: torch.Tensor, gates: torch.Tensor, expert: Callable[[int, torch.Tensor], torch.Tensor],
        only: set[int] | None = None):  # fmt: skip
    """Sparse mixture of experts: x [..., H], gates [..., E] -> [..., H].

    `expert(e, rows)` runs expert e on the rows [n, H] routed to it, and is called only for experts that have any (of
    `only`, where given), so weights are touched one expert at a time.
    """
    rows, gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    result = torch.zeros_like(rows)
    used = gates.any(0).nonzero()[:, 0].tolist()
    for e in used if only is None else sorted(only.intersection(used)):
        routed = gates[:, e].nonzero()[:, 0]
        result.index_add_(0, routed, expert(e, rows[routed]) * gates[routed, e, None])
    return result.view_as(x)
