"""How experts are chosen, a budget is shared and experts are merged: against plain loops and brute force in float64 numpy."""

from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from pruning_oracle import (
    Block,
    gates_of,
    inner_of,
)

from compress.model.routing import Router
from compress.passes.pruning import allocation, merging, reconstruction, scores
from compress.passes.pruning.reconstruction import Reconstruction
from compress.passes.pruning.statistics import Statistics

ROUTERS = ("slice", "rescale", "keep_rows")
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}  # sums of some hundred float32 products of numbers near 1, against float64
PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def random_block(experts: int = 5, top_k: int = 2, tokens: int = 131, seed: int = 0) -> Block:
    """Outputs that resemble each other, of experts of very different size; the last expert is never reached."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(tokens, experts, 7)) + rng.normal(size=(tokens, 1, 7))
    outputs *= np.linspace(0.5, 3, experts)[:, None]
    logits = rng.normal(size=(tokens, experts)) * 2
    logits[:, -1] = -50.0
    return Block(logits, outputs, rng.normal(size=(tokens, 7)) * 2, rng.random(tokens) < 0.4, top_k)


def sample_of(block: Block) -> np.ndarray:
    """Every second of the withheld tokens."""
    return np.flatnonzero(block.withheld)[::2]


def statistics_of(block: Block) -> Statistics:
    single = lambda values: torch.tensor(values, dtype=torch.float32)  # noqa: E731
    chosen = block.outputs[sample_of(block)]
    return Statistics(
        router=Router("router", block.logits.shape[1], block.top_k),
        bias=None,
        logits=single(block.logits),
        norms=single(np.linalg.norm(block.outputs, axis=2) * (block.gates > 0)),
        importance=single(block.importance),
        withheld=torch.tensor(block.withheld),
        sample=torch.tensor(sample_of(block)),
        gram=single(np.einsum("neh,ndh->ned", chosen, chosen)),
    )


# ---- scores


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", scores.NAMES)
def test_a_score_is_what_a_loop_over_the_tokens_says(name, top_k):
    block = random_block(top_k=top_k)
    found = scores.of(name, statistics_of(block)).double().numpy()
    np.testing.assert_allclose(found, block.score(name), **FLOAT32)
    assert found[-1] == 0 and np.all(found[:-1] > 0)  # no token reaches the last expert


@pytest.mark.parametrize("name", scores.NAMES)
def test_the_four_scores_differ_and_withheld_tokens_count_in_none(name):
    block = random_block()
    found = {other: scores.of(other, statistics_of(block)).numpy() for other in scores.NAMES}
    assert all(not np.allclose(found[name], found[other]) for other in found if other != name)
    changed = replace(
        block,
        logits=np.where(block.withheld[:, None], -block.logits, block.logits),
        outputs=np.where(block.withheld[:, None, None], 100.0, block.outputs),
    )
    assert np.array_equal(found[name], scores.of(name, statistics_of(changed)).numpy())


# ---- the loss of a set of experts


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_loss_of_every_set_is_that_of_its_output_computed_directly(router, top_k):
    block = random_block(top_k=top_k)
    search, tokens = Reconstruction(statistics_of(block), router), sample_of(block)
    whole = block.loss(np.zeros_like(block.given), tokens)
    for count in range(2, 6):
        for kept in combinations(range(5), count):
            expected = block.loss_of(kept, router, tokens)
            # a difference of inner products as large as the whole output's, each exact to 2^-24
            assert search.loss(kept) == pytest.approx(expected, rel=1e-4, abs=1e-5 * whole), kept
    assert search.share(whole) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_only_the_products_of_experts_that_a_token_goes_to_count(router):
    """With 128 experts, two or three of them for a token: the other 16,000 of its inner products may be anything."""
    block = random_block(experts=128, tokens=61)
    found, tokens = statistics_of(block), sample_of(block)
    ranks = (-block.logits[tokens]).argsort(1).argsort(1)
    near = ranks < block.top_k + 1  # those it goes to with any one expert removed
    unread = torch.tensor(~(near[:, :, None] & near[:, None]))
    search = Reconstruction(replace(found, gram=found.gram.masked_fill(unread, torch.nan)), router)
    for removed in (0, 5, 77, 127):
        kept = tuple(expert for expert in range(128) if expert != removed)
        assert search.loss(kept) == pytest.approx(block.loss_of(kept, router, tokens), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("router", ROUTERS)
def test_the_best_set_is_that_of_trying_all(router, seed):
    block = random_block(seed=seed)
    search, tokens = Reconstruction(statistics_of(block), router), sample_of(block)
    for count in (2, 3):  # with four, the expert that is never reached goes, and nothing is lost
        kept, loss = search.best(count)
        assert kept == block.best(count, router, tokens)
        assert loss == pytest.approx(block.loss_of(kept, router, tokens), rel=1e-4)
    assert search.best(4)[0] == (0, 1, 2, 3)


def test_the_ways_of_treating_the_router_do_not_lose_the_same():
    block = random_block()
    losses = {router: Reconstruction(statistics_of(block), router).loss((0, 1, 3)) for router in ROUTERS}
    assert losses["rescale"] < 0.99 * losses["slice"]
    assert len({round(loss, 5) for loss in losses.values()}) == 3


def test_many_experts_are_left_out_one_by_one_and_few_sets_are_still_all_tried():
    """Of 12 experts 220 are the sets of 9 and of 3, but 495 those of 8."""
    block = random_block(experts=12, tokens=67)
    search, tokens = Reconstruction(statistics_of(block), "slice"), sample_of(block)
    curve = search.curve(3)
    assert sorted(curve) == list(range(3, 12))
    assert curve[9][0] == block.best(9, "slice", tokens)
    assert curve[3][0] == block.best(3, "slice", tokens)
    rng = np.random.default_rng(0)
    for count in range(4, 9):
        kept, loss = curve[count]
        candidates = list(combinations(curve[count + 1][0], count))
        assert kept == min(candidates, key=lambda kept: block.loss_of(kept, "slice", tokens))
        others = [tuple(sorted(rng.choice(12, count, replace=False).tolist())) for _ in range(41)]
        assert loss < np.median([block.loss_of(other, "slice", tokens) for other in others])


def test_experts_whose_rows_stay_have_the_very_gates_they_had():
    block, kept = random_block(), (0, 2, 3)
    logits = torch.tensor(block.logits, dtype=torch.float32)
    gates = reconstruction.gates_of(statistics_of(block), logits, kept, keep_rows=True).double().numpy()
    stayed = np.count_nonzero(block.gates[:, kept], axis=1) == 2  # tokens that lose none of their experts
    assert 10 < stayed.sum() < len(stayed)
    np.testing.assert_allclose(gates[stayed], block.gates[stayed][:, kept], rtol=1e-5)
    expected = gates_of(block.logits, kept, 2, rows_stay=True)[:, kept]
    np.testing.assert_allclose(gates, expected, rtol=1e-5, atol=1e-7)
    sliced = reconstruction.gates_of(statistics_of(block), logits, kept, keep_rows=False).double().numpy()
    np.testing.assert_allclose(sliced, gates_of(block.logits, kept, 2)[:, kept], rtol=1e-5, atol=1e-7)


# ---- a budget shared among layers


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_shared_as_trying_all_ways_would(seed):
    rng = np.random.default_rng(seed)
    curves = {layer: {count: float(rng.random()) for count in (2, 3, 4)} for layer in (1, 4, 7)}  # no curve is convex
    with_all = {layer: {5: 0.0, **curve} for layer, curve in curves.items()}
    for removed in range(10):
        kept = allocation.allocate(curves, 5, removed)
        assert list(kept) == [1, 4, 7]
        assert sum(5 - count for count in kept.values()) == removed
        ways = [counts for counts in product((2, 3, 4, 5), repeat=3) if 15 - sum(counts) == removed]
        least = min(sum(with_all[layer][count] for layer, count in zip(kept, counts, strict=True)) for counts in ways)
        assert sum(with_all[layer][count] for layer, count in kept.items()) == pytest.approx(least)


# ---- merging


def random_expert(seed: int, inner: int = 56, hidden: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {part: torch.randn(*shape, generator=generator) for part, shape in zip(PARTS, shapes, strict=True)}


def shuffled(expert: dict, order) -> dict:
    gate, up, down = (expert[part] for part in PARTS)
    return dict(zip(PARTS, (gate[order], up[order], down[:, order]), strict=True))


def given_by(expert: dict, x: np.ndarray) -> np.ndarray:
    gate, up, down = (expert[part].double().numpy() for part in PARTS)
    return inner_of(x, gate, up) @ down.T


def test_an_expert_whose_hidden_units_were_shuffled_is_put_back_in_order_and_averages_to_itself():
    expert, order = random_expert(0), torch.randperm(56, generator=torch.Generator().manual_seed(1))
    other = shuffled(expert, order)
    back = merging.aligned(other, expert)
    assert all(torch.equal(back[part], expert[part]) for part in PARTS)
    x = np.random.default_rng(0).normal(size=(17, 40))
    merged = merging.average([expert, other, expert], [0.2, 0.7, 0.4])
    np.testing.assert_allclose(given_by(merged, x), given_by(expert, x), rtol=1e-4, atol=1e-3)  # of values near 300


def test_the_order_of_hidden_units_is_the_best_of_all():
    """All three matrices count alike, however large their numbers are."""
    one, other = random_expert(2, inner=5, hidden=3), random_expert(3, inner=5, hidden=3)
    other[PARTS[1]] *= 100
    one[PARTS[2]] *= 0.01

    def likeness(order) -> float:
        turned = shuffled(other, list(order))
        return sum(float((turned[p] * one[p]).sum() / turned[p].norm() / one[p].norm()) for p in PARTS)

    best = max(permutations(range(5)), key=likeness)
    found = merging.aligned(other, one)
    assert all(torch.equal(found[part], shuffled(other, list(best))[part]) for part in PARTS)


@pytest.mark.parametrize(
    ("usage", "shares"),
    [([3.0, 1.0], (0.75, 0.25)), ([0.0, 0.0], (0.5, 0.5)), ([2.0, 0.0], (1, 0)), ([0.0, 2.0], (0, 1))],
)
def test_experts_are_averaged_by_how_much_each_was_used(usage, shares):
    one, other = random_expert(4), random_expert(5)
    merged, turned = merging.average([one, other], usage), merging.aligned(other, one)
    for part in PARTS:
        torch.testing.assert_close(merged[part], shares[0] * one[part] + shares[1] * turned[part])


def test_a_removed_expert_joins_the_kept_one_whose_outputs_are_most_like_its_own():
    block = random_block()
    block.outputs[:, 4] += block.outputs[:, 1]
    tokens, kept = sample_of(block), (1, 3)
    flat = (block.outputs * np.sqrt(block.importance)[:, None, None])[tokens].transpose(1, 0, 2).reshape(5, -1)
    norms = np.linalg.norm(flat, axis=1)
    cosine = flat @ flat.T / np.outer(norms, norms)
    found = statistics_of(block).similarity()
    np.testing.assert_allclose(found, cosine, **FLOAT32)
    expected = {1: [1], 3: [3]}
    for expert in (0, 2, 4):
        expected[1 if cosine[expert, 1] > cosine[expert, 3] else 3].append(expert)
    assert merging.groups(found, kept) == list(expected.values())
    assert all(len(group) > 1 for group in expected.values())
