"""One pruned layer: what calibration tells of it, against transformers' model, and its corrections, against least squares in
float64 numpy."""

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
from compress.passes.pruning import correction as corrections
from compress.passes.pruning import prune as layer
from compress.passes.pruning import reconstruction, removal, statistics
from compress.passes.pruning.correction import Correction
from compress.passes.pruning.statistics import Statistics, collect
from compress.runtime.inference import HiddenStates

PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


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


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_outputs_of_all_experts_are_in_memory_and_no_more(moe, monkeypatch, most):
    whole, inputs = collected(moe)
    target = inputs.scratch(statistics.TARGET)
    given = [target.read(number) for number in range(len(target))]
    together, add_some = [], statistics._Collector._add_some

    def recorded(self, hidden, rows, sampled):
        together.append(int(sampled.sum()))
        return add_some(self, hidden, rows, sampled)

    monkeypatch.setattr(statistics._Collector, "_add_some", recorded)
    monkeypatch.setattr(statistics, "OUTPUT_ELEMENTS", most * 5 * 40)
    found, inputs = collected(moe)
    assert max(together) == most
    for name in ("logits", "norms", "importance", "gram"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    target = inputs.scratch(statistics.TARGET)
    for number, expected in enumerate(given):
        torch.testing.assert_close(target.read(number), expected, rtol=1e-4, atol=1e-5)


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
    model._entering[0] = states
    message = refusal(lambda: collect(moe.unit, model))
    assert "calibration" in message and "183 tokens" in message


# ---- corrections

KEPT = (0, 2, 3)


def correction_of(moe, router: str = "slice") -> tuple[Correction, Block]:
    """A pruned layer before any correction; and the block with the very float32 statistics that weigh it."""
    found, inputs = collected(moe)
    pruned = removal.keep(moe.unit, inputs, KEPT, keep_rows=router == "keep_rows")
    gates = reconstruction.gates_of(found, found.logits, KEPT, keep_rows=router == "keep_rows")
    with torch.inference_mode():
        return Correction(pruned, inputs, found, gates, inputs.stash(pruned)), moe.block


def down_of(correction: Correction, position: int) -> np.ndarray:
    name = f"model.layers.1.feed_forward.experts.{position}.down_proj.weight"
    return correction.unit.weights[name].dense().double().numpy()


@pytest.mark.parametrize("router", ["slice", "keep_rows"])
def test_the_loss_is_that_of_what_the_kept_experts_give_on_withheld_tokens(moe, router):
    correction, block = correction_of(moe, router)
    assert correction.loss == pytest.approx(block.loss(block.left_of(KEPT, router)), rel=1e-3)


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
    assert correction.loss == pytest.approx(block.loss(left * expected), rel=1e-3)
    assert correction.stored_loss() == pytest.approx(block.loss(left * expected), rel=1e-3)


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
    before = correction.loss
    accepted, downs, loss = recovered(moe, damping)
    assert correction.recover(damping) == accepted
    for position in range(3):
        change = np.abs(downs[position] - expert_of(moe.tensors, 1, KEPT[position])[2]).max()
        # the float32 moments' error, as a share of the change: times their condition number, some 100 at this damping
        np.testing.assert_allclose(down_of(correction, position), downs[position], atol=1e-6 + 5e-3 * change)
    assert correction.loss == pytest.approx(loss, rel=1e-3)
    assert correction.stored_loss() == pytest.approx(loss, rel=1e-3)
    if damping == 30.0:
        assert accepted and correction.loss < before
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
    before = correction.loss = correction._loss(correction._given)
    assert correction.recover(3.0) == []
    assert correction.loss == before
    for position, expert in enumerate(KEPT):
        assert np.array_equal(down_of(correction, position), expert_of(moe.tensors, 1, expert)[2])


@torch.inference_mode()
def test_an_expert_that_no_fitted_token_reaches_is_left_as_it_is(moe):
    correction, _ = correction_of(moe)
    correction.gates[:, 1] = 0
    correction.stored_loss()
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
    kept, block = note["kept"], moe.block
    experts = [[unit.weights[f"model.layers.1.feed_forward.experts.{position}.{part}"].dense().double().numpy()
                for part in PARTS] for position in range(3)]  # fmt: skip
    gates = gates_of(block.logits, kept, block.top_k, rows_stay=router == "keep_rows")[:, kept]
    given = np.einsum("te,teh->th", gates, outputs_of(moe.x, experts))
    losses = note["loss"]
    assert losses["stored"] == pytest.approx(block.loss(given), rel=1e-3)
    assert losses["pruned"] == pytest.approx(block.loss(block.left_of(kept, router)), rel=1e-3)
    assert ("rescaled" in losses) == (router == "rescale")
    assert tuple(kept) == block.best(3, router)


@torch.inference_mode()
@pytest.mark.parametrize("recovery", ["none", "least_squares"])
def test_the_stored_loss_counts_the_rounding_to_the_type_in_which_weights_are_stored(moe, recovery):
    """The very loss of the layer as it is, run again: bfloat16 moves it by some 1e-4 of itself."""
    options = SimpleNamespace(method="reconstruction", router="rescale", recovery=recovery, damping=3.0)
    rounded = moe.unit.map(lambda w: w.with_load("bf16", lambda rows=None: w.load(rows).bfloat16()))
    unit, note = layer.prune(options, rounded, moe.inputs(), 3)
    inputs, entry = moe.inputs(), note
    found = collect(rounded, inputs)
    gates = reconstruction.gates_of(found, found.logits, tuple(entry["kept"]), keep_rows=False)
    again = Correction(unit, inputs, found, gates, None).loss
    assert entry["loss"]["stored"] == pytest.approx(again, rel=1e-7)
    if recovery == "none":
        assert entry["loss"]["rescaled"] == entry["loss"]["stored"]  # judged as stored, too


def test_a_ridge_that_rounding_drowns_is_raised_until_it_can_be_solved():
    """Two rows for five columns, in float32: without a ridge that shows, the moments are no more than positive."""
    z, lacking = torch.tensor([[1.0, 2, 3, 4, 5], [1e3, 0, 1, 0, 1]]), torch.tensor([[1.0, -1], [2, 0]])
    change = corrections._ridge(z.T @ z, z.T @ lacking, 1e-12)
    torch.testing.assert_close(z @ change.T, lacking, rtol=1e-2, atol=1e-2)  # the least-squares solution fits two rows
    assert corrections._ridge(torch.zeros(5, 5), torch.zeros(5, 2), 1.0) is None


@torch.inference_mode()
def test_a_correction_is_judged_in_the_type_it_is_stored_in(moe):
    """bfloat16 moves the loss by some 1e-4 of itself; the sums of the loss are good to about 1e-6."""
    rounded = moe.unit.map(lambda w: w.with_load("bf16", lambda rows=None: w.load(rows).bfloat16()))
    inputs = moe.inputs()
    found = collect(rounded, inputs)
    pruned = removal.keep(rounded, inputs, KEPT, keep_rows=False)
    gates = reconstruction.gates_of(found, found.logits, KEPT, keep_rows=False)
    correction = Correction(pruned, inputs, found, gates, inputs.stash(pruned))
    assert correction.recover(3.0)
    judged = correction.loss
    assert correction.stored_loss() == pytest.approx(judged, rel=5e-6)


@torch.inference_mode()
def test_what_is_not_a_number_is_not_adopted(moe):
    correction, _ = correction_of(moe)
    for number, shape in enumerate(correction._candidate.shapes):
        correction._candidate.write(number, torch.full(shape, torch.nan))
    before = correction.unit
    assert not correction._adopt(lambda: None)
    assert correction.unit is before


def test_a_factor_never_turns_the_output_around():
    assert reconstruction.factor(3.0, 2.0) == 1.5
    assert reconstruction.factor(-3.0, 2.0) == reconstruction.factor(3.0, 0.0) == 1.0
