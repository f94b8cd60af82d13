"""What a router makes of its logits: against transformers' router of Nemotron-H, and where scores tie."""

import numpy as np
import pytest
import torch
from nemotron_h_models import configuration
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from compress.model.routing import Router

EXPERTS = 12
ROUTERS = {
    "top 1": {"num_experts_per_tok": 1},
    "top 3": {"num_experts_per_tok": 3},
    "all": {"num_experts_per_tok": EXPERTS},
    "not renormalised": {"num_experts_per_tok": 3, "norm_topk_prob": False},
    "scale 1": {"num_experts_per_tok": 3, "routed_scaling_factor": 1.0},
    "2 of 4 groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    "1 of 2 groups, all of it": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 6},
    "3 of 6 groups of two": {"n_group": 6, "topk_group": 3, "num_experts_per_tok": 2},
    "all of 3 groups": {"n_group": 3, "topk_group": 3, "num_experts_per_tok": 4},
}


def gates(logits, top_k, experts, score="softmax", bias=None, **described):
    named = None if bias is None else "bias"
    return Router("router", logits.shape[-1], top_k, score, named, **described).gates(logits, experts, bias)


def ours(config, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    routing = {"groups": config.n_group, "groups_used": config.topk_group}
    scale, renormalized = config.routed_scaling_factor, config.norm_topk_prob
    return gates(logits, config.num_experts_per_tok, EXPERTS, "sigmoid", bias, **routing,
                 renormalized=renormalized, scale=scale)  # fmt: skip


@pytest.mark.parametrize("bias", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_sigmoid_router_is_that_of_transformers(router, bias):
    config = configuration(n_routed_experts=EXPERTS, **ROUTERS[router])
    reference, g = NemotronHTopkRouter(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        reference.weight.normal_(0, 0.3, generator=g)
        reference.e_score_correction_bias.uniform_(-bias, bias, generator=g)
        x = torch.randn(2, 150, config.hidden_size, generator=g)
        logits, weights, chosen = reference(x)
    expected = torch.zeros(300, EXPERTS).scatter_(-1, chosen, weights)
    actual = ours(config, logits.view(2, 150, EXPERTS), reference.e_score_correction_bias)
    assert actual.shape == (2, 150, EXPERTS)
    torch.testing.assert_close(actual.view(300, EXPERTS), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(actual.view(300, EXPERTS) > 0, expected > 0)


def test_scores_that_are_all_zero_give_gates_of_zero():
    assert gates(torch.full((3, 4), -200.0), 2, 4, "sigmoid", renormalized=True, scale=2.5).eq(0).all()


def test_rows_of_removed_experts_are_not_chosen():
    logits = torch.tensor([[0.1, 0.2, 9.0, 9.0]])
    assert gates(logits, 1, 2, "sigmoid", torch.zeros(2))[0].tolist() == [0.0, pytest.approx(1 / (1 + np.exp(-0.2)))]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_of_equal_scores_the_lower_number_is_chosen(top_k):
    """Scores of three values, so that most tokens tie. Score and bias are sums that float32 holds exactly."""
    g = np.random.default_rng(0)
    logits, bias = np.zeros((50, 11), np.float32), g.integers(0, 3, (50, 11)).astype(np.float32)
    for row, row_bias in zip(logits, bias, strict=True):
        found = gates(torch.from_numpy(row[None]), top_k, 11, "sigmoid", torch.from_numpy(row_bias))[0].nonzero()[:, 0]
        assert found.tolist() == sorted(np.argsort(-row_bias, kind="stable")[:top_k])


def test_of_equal_groups_the_lower_number_is_chosen():
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, -5.0, -5.0]])
    found = gates(logits, 2, 6, "sigmoid", groups=3, groups_used=1)[0].nonzero()[:, 0]
    assert found.tolist() == [0, 1]


def test_renormalised_after_a_softmax_is_the_softmax_of_the_chosen():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    values, chosen = logits.topk(3)
    expected = torch.zeros(40, 8).scatter_(-1, chosen, values.softmax(-1))
    torch.testing.assert_close(gates(logits, 3, 8, renormalized=True), expected)
