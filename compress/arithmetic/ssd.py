"""The arithmetic that Mamba-2 brings (state space duality, arXiv 2405.21060) and its neighbours, as plain functions.

Glossary

    B  batch     S  tokens     H  heads     P  width of a head     G  groups that share b and c     N  states

    x   [B, S, H, P]  input of the scan          b   [B, S, G, N]  input matrix, of H / G heads in a row
    dt  [B, S, H]     time step, after softplus  c   [B, S, G, N]  output matrix, of the same heads
    a   [H]           decay, below 0             d   [H]           skip connection

    state [B, H, N, P]
"""

import itertools

import torch
from torch import Tensor

from compress import parallel

CHUNK = 64  # tokens worked on at once: their products are squares of this size
PIECE_ELEMENTS = 1 << 18  # float32 elements that a step of a piece works on (1 MiB stays in a core's cache)


def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t a) S_{t-1} + dt_t b_t (outer) x_t,  y_t = c_t . S_t + d x_t.

    Returns y [B, S, H, P] and the state after the last token. Where dt is 0 (padding) the state passes unchanged. No loop
    over tokens: within a chunk every token is a weighted sum of those before it, one product of squares, and the state is
    handed from chunk to chunk. Every decay is exp of a sum of dt a between two tokens, never above 0: nothing overflows.
    Heads go in pieces that shapes alone decide.
    """
    (batch, length, heads, width), (groups, states) = x.shape, b.shape[2:]
    # of one head; a chunk holds the state before and after it, and its squares in float64 for a moment
    cost = states * width if length == 1 else 2 * (states * width + CHUNK * (CHUNK + width))
    y, final = torch.empty_like(x), torch.empty_like(state)
    advance = _one_token if length == 1 else _chunks

    def scan(piece: tuple[slice, slice, slice]) -> None:
        row, group, head = piece
        x_g, dt_g, y_g = (tensor.unflatten(2, (groups, -1))[row, :, group, head] for tensor in (x, dt, y))
        start, end = (tensor.unflatten(1, (groups, -1))[piece] for tensor in (state, final))
        a_g = a.unflatten(0, (groups, -1))[group, head]
        advance(x_g, dt_g, a_g, b[row, :, group], c[row, :, group], start, y_g, end)

    parallel.each(scan, _pieces(batch, groups, heads // groups, max(1, PIECE_ELEMENTS // cost)))
    return y.addcmul_(d[:, None], x), final


def _pieces(batch: int, groups: int, heads: int, most: int) -> list[tuple[slice, slice, slice]]:
    """Rows of the batch, groups and heads of a group, at most so many heads in all: as many of one group as may be, since
    they share its products, then as many groups, then rows."""
    heads_at_once = min(heads, most)
    groups_at_once = min(groups, most // heads_at_once) if heads_at_once == heads else 1
    rows_at_once = max(1, most // (heads_at_once * groups_at_once))
    cuts = ((batch, rows_at_once), (groups, groups_at_once), (heads, heads_at_once))
    rows, pairs, singles = (parallel.slices(*cut) for cut in cuts)
    return list(itertools.product(rows, pairs, singles))


def _one_token(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, y: Tensor, end: Tensor) -> None:
    """x, y [B, 1, g, h, P], dt [B, 1, g, h], a [g, h], b, c [B, 1, g, N], start, end [B, g, h, N, P]; fills y and end."""
    fed = (dt[..., None] * x)[:, 0, :, :, None]  # [B, g, h, 1, P]
    decay = torch.exp(dt * a)[:, 0, :, :, None, None]
    torch.mul(start, decay, out=end).add_(b[:, 0, :, None, :, None] * fed)
    y[:, 0] = (c[:, 0, :, None, None] @ end)[..., 0, :]


def _chunks(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, y: Tensor, end: Tensor) -> None:
    """The same of [B, S, ...], chunk by chunk; in between the state is [B, g, N, h P], as one product takes it."""
    shape = (start.shape[1], start.shape[2], start.shape[4])  # g, h, P
    fed = (dt[..., None] * x).transpose(1, 2).contiguous()  # [B, g, S, h, P]
    # in float64: a small step that follows large ones would drown in the difference of two float32 sums
    rates = (dt.double() * a.double()).permute(0, 2, 3, 1)  # [B, g, h, S]
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # [B, g, S, N]
    state = start.transpose(2, 3).flatten(3)
    for t in parallel.slices(x.shape[1], CHUNK):
        sums = rates[..., t].cumsum(-1)
        part, state = _chunk(fed[:, :, t], sums, b[:, :, t], c[:, :, t], state)
        y[:, t] = part.transpose(1, 2)
    end.copy_(state.unflatten(3, shape[1:]).transpose(2, 3))


def _chunk(fed: Tensor, sums: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of L tokens: fed [B, g, L, h, P], sums [B, g, h, L] of dt a from its first token on, b, c [B, g, L, N],
    state [B, g, N, h P] before it. Returns y [B, g, L, h, P] and the state after it."""
    gaps = (sums[..., :, None] - sums[..., None, :]).float()  # from token j to token i
    gaps.masked_fill_(_later(gaps), -torch.inf)
    weights = gaps.exp_().mul_((c @ b.mT)[:, :, None])  # [B, g, h, L, L]
    within = (weights @ fed.transpose(2, 3)).transpose(2, 3)
    since_start, until_end = _by_token(sums), _by_token(sums[..., -1:] - sums)
    y = torch.addcmul(within, since_start, (c @ state).view_as(fed))
    decay = sums[..., -1].float().exp().repeat_interleave(fed.shape[-1], -1)[:, :, None]  # [B, g, 1, h P]
    return y, torch.addcmul(b.mT @ (fed * until_end).flatten(3), decay, state)


def _later(gaps: Tensor) -> Tensor:
    """Where the token of a row [..., L, L] comes before that of the column."""
    length = gaps.shape[-1]
    return torch.ones(length, length, dtype=torch.bool, device=gaps.device).triu(1)


def _by_token(sums: Tensor) -> Tensor:
    """exp of [B, g, h, L] as [B, g, L, h, 1]."""
    return sums.float().exp().transpose(2, 3)[..., None]
