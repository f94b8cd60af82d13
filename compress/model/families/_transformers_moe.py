"""Mixtures of experts of transformers' models in the sizes that pruning left, and with our choice between equal experts, for
`compress.load`.

Modelling code there takes one number of experts from the configuration and gives every router as many rows; which of equal
experts it chooses is left open.
"""

import copy

import torch
from transformers import PreTrainedModel

from compress.model import routing
from compress.model.experts import Experts

ALIGNED = 8  # numbers of the smallest type that a matrix is loaded in: grouped products need rows of so many


class _Choosing(torch.nn.Module):
    """In front of a router's own class: what it computes, by our arithmetic."""

    ours: routing.Router
    num_experts: int
    weight: torch.nn.Parameter  # [R, H]

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., H] -> logits [tokens, R], weights and numbers of the experts chosen, [tokens, top-k] each.

        Of equal experts the lower number is chosen, and only the first E are chosen from: rows after them belong to experts
        that were removed.
        """
        rows = hidden_states.flatten(0, -2)
        logits = routing.logits(rows, self.weight)
        bias = getattr(self, "e_score_correction_bias", None)
        weights, chosen = self.ours.choice(logits.float(), self.num_experts, bias)
        return logits, weights.to(rows.dtype), chosen


def fit(model: PreTrainedModel, path: str, router: str, key: str, experts: Experts) -> None:
    """Puts an empty mixture of these experts in place of the one at `path`, whose router is its `router`; `key` of the
    model's configuration says how many experts it makes."""
    config = copy.deepcopy(model.config)
    setattr(config, key, experts.count)
    block = type(model.get_submodule(path))(config).to(model.dtype)
    theirs = block.get_submodule("experts")
    setattr(theirs, "config", model.config)  # noqa: B010 - where it looks up how experts are computed, which a user may set
    _choose_as_we(block.get_submodule(router), experts.router)
    if any(matrix.shape[-1] % ALIGNED for matrix in theirs.parameters()):
        model.set_experts_implementation("eager")
    model.set_submodule(path, block)


def _choose_as_we(router: torch.nn.Module, ours: routing.Router) -> None:
    """It stays one of its class: transformers knows routers by that."""
    router.__class__ = type("Router", (_Choosing, type(router)), {})
    weight = router.get_parameter("weight")
    changed = {"ours": ours, "weight": torch.nn.Parameter(weight.new_empty(ours.rows, weight.shape[1]))}
    if ours.bias is not None:
        changed["e_score_correction_bias"] = router.get_buffer("e_score_correction_bias").float()
    for name, value in changed.items():
        setattr(router, name, value)
