"""How experts are chosen and what stays is corrected: against plain loops and brute force in float64 numpy, and, of what
calibration shows of a layer, against transformers' model."""

from dataclasses import replace
from itertools import combinations, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jamba_models import load_reference
from pruning_oracle import (
    Block,
    block_of,
    expert_of,
    gates_of,
    inner_of,
    make_source,
    outputs_of,
    tensors_in,
    withheld_of,
)
from refusals import refusal

from compress.calibration.inputs import LayerInputs
from compress.checkpoint.reader import Checkpoint
from compress.inference import HiddenStates
from compress.pruning import allocation, layer, merging, reconstruction, removal, scores, statistics
from compress.pruning.correction import Correction
from compress.pruning.reconstruction import Reconstruction
from compress.pruning.statistics import Statistics, collect

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
        top_k=block.top_k,
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
    gates = reconstruction.gates_of(logits, kept, 2, keep_rows=True).double().numpy()
    stayed = np.count_nonzero(block.gates[:, kept], axis=1) == 2  # tokens that lose none of their experts
    assert 10 < stayed.sum() < len(stayed)
    np.testing.assert_allclose(gates[stayed], block.gates[stayed][:, kept], rtol=1e-5)
    expected = gates_of(block.logits, kept, 2, rows_stay=True)[:, kept]
    np.testing.assert_allclose(gates, expected, rtol=1e-5, atol=1e-7)
    sliced = reconstruction.gates_of(logits, kept, 2, keep_rows=False).double().numpy()
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


# ---- what calibration tells of a layer

LENGTHS = (197, 197, 197, 131)  # primes: every window ends in a broken stretch; two blocks of two, then one of one


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def moe(request, tmp_path_factory):
    """A float32 model's layer 1 with what reaches it: `layer()` gives fresh inputs; `block` and `x` are transformers'."""
    folder = tmp_path_factory.mktemp("moe")
    source = make_source(folder / "model", torch.float32, num_hidden_layers=2, num_experts_per_tok=request.param)
    generator = torch.Generator().manual_seed(5)
    windows = [torch.randint(3, 67, (length,), generator=generator) for length in LENGTHS]
    reference, entering, given = load_reference(source), [], []
    decoder = reference.model.layers[1]
    hooks = [
        decoder.register_forward_pre_hook(lambda module, arguments: entering.append(arguments[0].detach())),
        decoder.feed_forward.register_forward_hook(
            lambda module, arguments, output: given.append(
                (output[0] if isinstance(output, tuple) else output).detach().reshape(-1, 40)
            )
        ),
    ]
    block, x = block_of(reference, tensors_in(source), 1, windows, top_k=request.param)
    for hook in hooks:
        hook.remove()
    states = HiddenStates(folder, windows, 40, tokens=400).at(folder / "states")
    assert [shape[0] for shape in states.shapes] == [2, 1, 1]
    for number, members in enumerate(states.blocks):
        states.write(number, torch.cat([entering[i] for i in members]))
    model, numbers = Checkpoint(source).model, iter(range(1000))

    def layer_inputs() -> LayerInputs:
        return LayerInputs(model, 1, states, folder / f"layer-{next(numbers)}", lambda weight: weight, "cpu")

    return SimpleNamespace(
        inputs=layer_inputs, unit=model.unit("layer.1"), block=block, x=x, windows=windows,
        given=torch.cat(given), tensors=tensors_in(source), states=states,
    )  # fmt: skip


def collected(moe) -> tuple[Statistics, LayerInputs]:
    inputs = moe.inputs()
    with torch.inference_mode():
        return collect(moe.unit, inputs), inputs


def test_what_is_collected_is_what_transformers_shows(moe):
    found, inputs = collected(moe)
    block, close = moe.block, {"rtol": 1e-3, "atol": 1e-4}  # float32 through a whole layer, of values near 1
    np.testing.assert_allclose(found.logits, block.logits, **close)
    np.testing.assert_allclose(found.gates, block.gates, **close)
    assert np.array_equal(found.gates.numpy() > 0, block.gates > 0)
    np.testing.assert_allclose(found.norms, np.linalg.norm(block.outputs, axis=2) * (block.gates > 0), **close)
    np.testing.assert_allclose(found.importance, block.importance, rtol=1e-3)
    assert np.array_equal(found.withheld, block.withheld)
    assert np.array_equal(found.sample, np.flatnonzero(block.withheld))
    chosen = block.outputs[block.withheld]
    np.testing.assert_allclose(found.gram, np.einsum("neh,ndh->ned", chosen, chosen), **close)
    assert found.tokens == (block.gates > 0).sum(0).tolist()
    target = inputs.scratch(statistics.TARGET)
    written = torch.cat([target.read(number).flatten(0, 1) for number in range(len(target))])
    torch.testing.assert_close(written, moe.given, **close)


def test_no_more_than_so_many_withheld_tokens_are_sampled_and_evenly(moe, monkeypatch):
    withheld = np.flatnonzero(moe.block.withheld)
    for name, most, expected in (("SAMPLE_TOKENS", 20, 20), ("GRAM_ELEMENTS", 13 * 25, 13)):
        with monkeypatch.context() as patch:
            patch.setattr(statistics, name, most)
            found, _ = collected(moe)
        sample = found.sample.numpy()
        places = np.searchsorted(withheld, sample)
        assert np.array_equal(withheld[places], sample)
        assert expected / 2 < len(places) <= expected
        assert places[0] == 0 and len(set(np.diff(places))) == 1
        assert len(withheld) - places[-1] <= places[1]
        assert found.gram.shape == (len(places), 5, 5)
        assert np.array_equal(found.withheld, moe.block.withheld)


@pytest.mark.parametrize(
    "lengths", [(512,) * 64, (512,), (197,), (24,) * 4, (71,) * 5, (71,) * 3, (300, 300, 40)], ids=str
)
def test_some_tokens_are_withheld_and_most_are_not(lengths, tmp_path):
    windows = [torch.zeros(length, dtype=torch.long) for length in lengths]
    found = statistics._withheld(HiddenStates(tmp_path, windows, 40)).numpy()
    assert np.array_equal(found, withheld_of(windows))
    assert 0 < found.mean() <= 1 / 3
    if len(lengths) == 64:
        assert found.mean() == pytest.approx(1 / 4, abs=0.01)


def test_calibration_too_small_to_withhold_any_is_refused(moe, tmp_path):
    few = [window[:61] for window in moe.windows[:3]]
    states = HiddenStates(tmp_path, few, 40).at(tmp_path / "states")
    states.write(0, torch.zeros(states.shapes[0]))
    model = moe.inputs()
    model._entering = states
    message = refusal(lambda: collect(moe.unit, model))
    assert "calibration" in message and "183 tokens" in message


# ---- corrections

KEPT = (0, 2, 3)


def correction_of(moe, router: str = "slice") -> tuple[Correction, Block]:
    """A pruned layer before any correction; and the block with the very float32 statistics that weigh it."""
    found, inputs = collected(moe)
    pruned = removal.keep(moe.unit, inputs, KEPT, keep_rows=router == "keep_rows")
    gates = reconstruction.gates_of(found.logits, KEPT, found.top_k, keep_rows=router == "keep_rows")
    with torch.inference_mode():
        return Correction(pruned, inputs, found, gates, inputs.stash(pruned)), moe.block


def down_of(correction: Correction, position: int) -> np.ndarray:
    name = f"model.layers.1.feed_forward.experts.{position}.down_proj.weight"
    return correction.unit.weights[name].dense().double().numpy()


@pytest.mark.parametrize("router", ["slice", "keep_rows"])
def test_the_loss_is_that_of_what_the_kept_experts_give_on_withheld_tokens(moe, router):
    correction, block = correction_of(moe, router)
    assert correction.loss() == pytest.approx(block.loss(block.left_of(KEPT, router)), rel=1e-3)


@torch.inference_mode()
def test_rescaling_takes_the_least_squares_factor_of_the_tokens_that_are_not_withheld_once(moe):
    correction, block = correction_of(moe)
    left = block.left_of(KEPT, "slice")
    expected = block.factor(left, ~block.withheld)
    assert abs(expected - block.factor(left, block.withheld)) > 1e-3 and abs(expected - 1) > 1e-2
    factor = correction.rescale()
    assert factor == pytest.approx(expected, rel=1e-4)
    for position, expert in enumerate(KEPT):
        down = expert_of(moe.tensors, 1, expert)[2]
        np.testing.assert_allclose(down_of(correction, position), factor * down, rtol=1e-6, atol=1e-9)
    assert correction.loss() == pytest.approx(block.loss(left * expected), rel=1e-3)
    correction.replay()  # from the weights
    assert correction.loss() == pytest.approx(block.loss(left * expected), rel=1e-3)


def recovered(moe, damping: float):
    """Ridge regression expert by expert in numpy; what lowers the withheld loss is kept. -> experts, downs, the loss."""
    block, gates = moe.block, gates_of(moe.block.logits, KEPT, moe.block.top_k)
    given, downs, accepted = block.left_of(KEPT, "slice"), [], []
    for position, expert in enumerate(KEPT):
        gate, up, down = expert_of(moe.tensors, 1, expert)
        z = inner_of(moe.x, gate, up) * gates[:, expert, None]
        fitted = (gates[:, expert] > 0) & ~block.withheld
        root = np.sqrt(block.importance[fitted])[:, None]
        a, b = z[fitted] * root, (block.given - given)[fitted] * root
        ridge = damping * np.square(a).sum(0).mean()
        # ridge as ordinary least squares with rows of its own
        rows = np.concatenate([a, np.sqrt(ridge) * np.eye(a.shape[1])])
        change = np.linalg.lstsq(rows, np.concatenate([b, np.zeros((a.shape[1], b.shape[1]))]), rcond=None)[0].T
        candidate = given + z @ change.T
        if block.loss(candidate) < block.loss(given):
            accepted.append(position)
            given, down = candidate, down + change
        downs.append(down)
    return accepted, downs, block.loss(given)


@torch.inference_mode()
@pytest.mark.parametrize("damping", [1.0, 30.0, 1e-3])
def test_least_squares_gives_the_ridge_solution_of_every_expert_and_keeps_what_helps_withheld_tokens(moe, damping):
    correction, block = correction_of(moe)
    before = correction.loss()
    accepted, downs, loss = recovered(moe, damping)
    assert correction.recover(damping) == accepted
    for position in range(3):
        change = np.abs(downs[position] - expert_of(moe.tensors, 1, KEPT[position])[2]).max()
        # the float32 moments' error, as a share of the change: times their condition number, some 100 at this damping
        np.testing.assert_allclose(down_of(correction, position), downs[position], atol=1e-6 + 5e-3 * change)
    assert correction.loss() == pytest.approx(loss, rel=1e-3)
    correction.replay()
    assert correction.loss() == pytest.approx(loss, rel=1e-3)
    if damping == 30.0:
        assert accepted and correction.loss() < before
    assert before == pytest.approx(block.loss(block.left_of(KEPT, "slice")), rel=1e-3)


@torch.inference_mode()
def test_what_helps_the_fitted_tokens_and_harms_the_withheld_ones_is_not_kept(moe):
    correction, block = correction_of(moe)
    first = 0
    for number, (windows, length, _) in enumerate(correction._target.shapes):  # withheld tokens lack the very opposite
        target, given = correction._target.read(number), correction._given.read(number)
        opposite = torch.tensor(block.withheld[first : first + windows * length]).view(windows, length, 1)
        correction._target.write(number, torch.where(opposite, 2 * given - target, target))
        first += windows * length
    before = correction.loss()
    assert correction.recover(3.0) == []
    assert correction.loss() == before
    for position, expert in enumerate(KEPT):
        assert np.array_equal(down_of(correction, position), expert_of(moe.tensors, 1, expert)[2])


@torch.inference_mode()
def test_an_expert_that_no_fitted_token_reaches_is_left_as_it_is(moe):
    correction, _ = correction_of(moe)
    correction.gates[:, 1] = 0
    correction.replay()
    assert 1 not in correction.recover(30.0)
    assert np.array_equal(down_of(correction, 1), expert_of(moe.tensors, 1, KEPT[1])[2])


@torch.inference_mode()
@pytest.mark.parametrize(("router", "recovery"), [("rescale", "least_squares"), ("keep_rows", "least_squares"),
                                                  ("rescale", "none"), ("slice", "none")])  # fmt: skip
def test_the_stored_loss_is_that_of_the_weights_as_they_are_stored(moe, router, recovery):
    options = SimpleNamespace(
        method="reconstruction", router=router, recovery=recovery, damping=3.0, merge_weights="frequency"
    )
    inputs = moe.inputs()
    unit, note = layer.prune(options, moe.unit, inputs, 3)
    kept, block = note["layers"][0]["kept"], moe.block
    experts = [[unit.weights[f"model.layers.1.feed_forward.experts.{position}.{part}"].dense().double().numpy()
                for part in PARTS] for position in range(3)]  # fmt: skip
    gates = gates_of(block.logits, kept, block.top_k, rows_stay=router == "keep_rows")[:, kept]
    given = np.einsum("te,teh->th", gates, outputs_of(moe.x, experts))
    losses = note["layers"][0]["loss"]
    assert losses["stored"] == pytest.approx(block.loss(given), rel=1e-3)
    assert losses["pruned"] == pytest.approx(block.loss(block.left_of(kept, router)), rel=1e-3)
    assert ("rescaled" in losses) == (router == "rescale")
    assert tuple(kept) == block.best(3, router)
