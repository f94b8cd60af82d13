"""transformers' cache with states rounded as config.json says, for models that `compress.load` returns.

The rule of `model/states.py`: a state is rounded once, at the end of the call that made it. So the cache is rounded when the
base model's forward has returned. Of a KV cache only the entries of that call's tokens are. The cache holds states themselves:
with error feedback the sum of both parts, and with a cadence, until a state is due, what its inputs in full precision made of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.utils.generic import ModelOutput

from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.states import StateKind, StateSpec, due, tokens_read

READ = "_compress_tokens_read"  # of a cache: how many tokens it has seen


class RoundedStates:
    """A forward hook of the base model. `scales` are the static ones, by layer and name of the state."""

    def __init__(self, layers: tuple[Layer, ...], scales: Mapping[tuple[int, str], Tensor]):
        self._layers = [layer for layer in layers if layer.precisions]
        self._scales = scales

    @torch.no_grad()
    def __call__(
        self,
        module: torch.nn.Module,
        args: tuple[object, ...],
        given: dict[str, object],
        output: tuple[object, ...] | ModelOutput,
    ) -> None:
        parts = output if isinstance(output, tuple) else output.to_tuple()
        hidden = parts[0]
        cache = next((part for part in parts if isinstance(part, Cache)), None)
        if cache is not None and isinstance(hidden, Tensor):
            new = hidden.shape[1]
            positions = _positions(cache, given.get("attention_mask"), new).to(hidden.device)
            for layer in self._layers:
                self._round(layer, cache.layers[layer.index], positions, new)

    def _round(self, layer: Layer, held: object, positions: Tensor, new: int) -> None:
        for spec in layer.states:
            if spec.name not in layer.precisions:
                continue
            if spec.kind == StateKind.KV:
                self._round_entries(layer, spec, held, positions, new)
            elif isinstance(held, LinearAttentionCacheLayerMixin):
                self._round_state(layer, spec, held, positions, new)

    def _round_entries(self, layer: Layer, spec: StateSpec, held: object, positions: Tensor, new: int) -> None:
        if not isinstance(held, DynamicLayer):
            raise TypeError(f"states are rounded in dynamic caches only, not in a {type(held).__name__}")
        name = f"{spec.name}s"  # keys, values: [B, heads, T, head_dim], as ours
        entries = getattr(held, name)
        past = entries.shape[2] - new
        rounded = self._rounded(layer, spec, entries[:, :, past:], positions)
        setattr(held, name, torch.cat([entries[:, :, :past], rounded], 2))

    def _round_state(
        self, layer: Layer, spec: StateSpec, held: LinearAttentionCacheLayerMixin, positions: Tensor, new: int
    ) -> None:
        """A convolution's inputs are its last ones there; a recurrent state is ours with the last two axes exchanged."""
        if spec.kind == StateKind.CONV:
            inputs, width = held.conv_states[0], spec.shape[-1]
            assert inputs is not None, "every call leaves one"
            rounded = self._rounded(layer, spec, inputs[..., -width:], positions)
            held.conv_states[0] = torch.cat([inputs[..., :-width], rounded], -1)
        else:
            state = held.recurrent_states[0]
            assert state is not None, "every call leaves one"
            value = state.transpose(-1, -2)
            rounded = self._rounded(layer, spec, value, positions)
            if spec.precision.every > 1:
                is_due = due(positions, new, spec.precision.every)
                rounded = torch.where(is_due.view(-1, *[1] * len(spec.shape)), rounded, value)
            held.recurrent_states[0] = rounded.transpose(-1, -2).contiguous()

    def _rounded(self, layer: Layer, spec: StateSpec, value: Tensor, positions: Tensor) -> Tensor:
        scales = self._scales.get((layer.index, spec.name))
        scales = None if scales is None else scales.to(value.device)
        found = spec.restored(spec.encoded(value.float(), positions, scales), scales)
        if (residual := spec.residual) is not None:
            found = found + residual.restored(residual.encoded(value.float() - found))
        return found.to(value.dtype)


def _positions(cache: Cache, mask: object, new: int) -> Tensor:
    """Real tokens read up to each token, itself included, [B, T] or [1, T]."""
    read = getattr(cache, READ, 0) + new
    setattr(cache, READ, read)
    return tokens_read(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, read)


def round_states(model: PreTrainedModel, ours: HybridModel) -> None:
    """From now on the model's cache rounds states, where config.json says so."""
    if not ours.config.compress.states:
        return
    scales = {
        (layer.index, spec.name): ours.unit(f"layer.{layer.index}").weights[layer.prefix + spec.scale_name].dense()
        for layer in ours.layers
        for spec in layer.states
        if spec.precision.has_static_scale
    }
    model.base_model.register_forward_hook(RoundedStates(ours.layers, scales), with_kwargs=True)
