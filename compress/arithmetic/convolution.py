"""The convolution of Mamba layers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution over time. x [B, S, D], weight [D, 1, W] -> y [B, S, D], new conv_state.

    The state is that after the last token: padding may stand before the tokens or after them, and x is 0 there.
    """
    padded = torch.cat([conv_state, x.transpose(1, 2)], dim=2)  # [B, D, W - 1 + S]
    y = F.conv1d(padded, weight, bias, groups=weight.shape[0])
    kept = weight.shape[2] - 1
    if mask is None:
        return y.transpose(1, 2), padded[:, :, -kept:].contiguous()
    newest = last_token(mask)[:, None] + torch.arange(kept, device=x.device)
    return y.transpose(1, 2), padded.gather(2, newest[:, None].expand(-1, padded.shape[1], -1))


def last_token(mask: Tensor) -> Tensor:
    """mask [B, S] of tokens -> places up to the last real one, [B]; 0 where there is none."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).long()
