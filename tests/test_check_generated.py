"""Texts that baseline and artifact go on with: what they are, and what is said of them."""

import json

import pytest
import torch
from jamba_models import load_reference
from refusals import refusal_of_command

from compress.apply import exporting
from compress.check import generated
from compress.check.generated import Task, Text
from compress.prompts import PromptSet
from compress.recipe.check import Generate
from compress.runtime import artifacts
from compress.runtime.artifacts import open_artifact

END = 2
QUICK = ("--prompts", "self", "--samples", 3, "--length", 12)


def rows_of(before, after, sets=None, entropy=0.5) -> dict[str, generated.GeneratedFacts]:
    """Of texts whose end is token 2, by figure; the prompts are in sets of these sizes. The candidate is as sure as said of each
    token, the baseline half a nat."""
    prompts = tuple((torch.zeros(1),) * size for size in sets or (len(before),))
    texts = [[Text(tokens, [nats] * len(tokens)) for tokens in of] for nats, of in ((0.5, before), (entropy, after))]
    return {row["figure"]: row for row in generated.figures("it", Task(prompts, 8, (END,)), *texts)}


def tokens_of(texts) -> list[list[int]]:
    return [text.tokens for text in texts]


def test_figures_of_texts_by_hand():
    before = [[5, 6, 7, 8, 5, 6, 7, 8], [5, 6, 7, END], [9, 9, 9, 9, 9, 9, 9, 9]]
    after = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, END], [9, 9, END]]
    found = rows_of(before, after, entropy=1.25)
    length = found["length"]
    assert (length["baseline"], length["candidate"]) == (pytest.approx(19 / 3), pytest.approx(13 / 3))
    assert (length["value"], length["texts"]) == (pytest.approx(-2), 3)
    assert length["low"] < -2 < length["high"]
    repeated = found["repeated_4grams"]  # of 5 runs one was there before, of 1 none, of 5 four
    assert (repeated["baseline"], repeated["candidate"]) == (5 / 11, 0)
    assert repeated["value"] == pytest.approx(-5 / 11)
    entropy = found["entropy"]
    assert (entropy["baseline"], entropy["candidate"], entropy["value"]) == pytest.approx((0.5, 1.25, 0.75))
    assert (entropy["low"], entropy["high"]) == pytest.approx((0.75, 0.75))  # of every text the same
    assert found["equal"]["value"] == pytest.approx(1 / 3)
    assert 0 <= found["equal"]["low"] < 1 / 3 < found["equal"]["high"] <= 1
    parted = found["first_difference"]
    assert (parted["value"], parted["texts"]) == (3, 2)  # at tokens 4 and 2


def test_texts_that_all_stayed_the_same_do_not_prove_that_none_can_change():
    texts = [[5, 6, 7, 8, 9, END]] * 20
    found = rows_of(texts, texts)
    # with 20 of 20 alike, 83.2 % may be: 0.025 ** (1 / 20)
    assert (found["equal"]["value"], found["equal"]["low"], found["equal"]["high"]) == (
        1,
        pytest.approx(0.8316, abs=1e-4),
        1,
    )
    assert (found["length"]["value"], found["length"]["low"]) == (0, None)
    assert (found["first_difference"]["texts"], found["first_difference"]["value"]) == (0, None)
    others = rows_of(texts, [[5, 6, 8, END]] * 20)
    assert (others["equal"]["low"], others["equal"]["high"]) == (0, pytest.approx(0.1684, abs=1e-4))
    assert others["first_difference"]["value"] == 2


def test_intervals_are_over_texts_within_their_prompt_sets():
    """All texts of one set are longer, those of the other are not: no drawing of texts within sets mixes that."""
    before = [[5] * 8] * 6
    found = rows_of(before, [[5] * 4 + [END]] * 3 + [[5] * 8] * 3, sets=(3, 3))
    assert (found["length"]["value"], found["length"]["low"], found["length"]["high"]) == (-2, -2, -2)
    mixed = rows_of(before, [[5] * 4 + [END]] * 3 + [[5] * 8] * 3)
    assert mixed["length"]["low"] < -2.5


def test_texts_too_short_to_repeat_anything_tell_nothing():
    found = rows_of([[5, END]] * 3, [[5, 6, END]] * 3)
    row = found["repeated_4grams"]
    assert [row[key] for key in ("baseline", "candidate", "value", "low", "high")] == [None] * 5
    json.dumps(list(found.values()), allow_nan=False)


# --- what is generated


class Named:
    """An artifact's configuration, with an end that the model comes by."""

    def __init__(self, artifact, end):
        self._artifact, self.folder = artifact, artifact.folder
        self.config = artifact.config.model_copy(update={"eos_token_id": end})


@pytest.fixture(scope="module")
def told(small):
    """A task of five prompts of two sets, in texts of up to 12 tokens, and what transformers gives."""
    generator = torch.Generator().manual_seed(8)
    sets = [
        PromptSet("a", [torch.randint(3, 67, (20,), generator=generator) for _ in range(9)]),
        PromptSet("b", [torch.randint(3, 67, (length,), generator=generator) for length in (5, 20)]),
    ]
    reference, prompts = (
        load_reference(small),
        [*(w[:7] for w in sets[0].windows[:3]), *(w[:7] for w in sets[1].windows)],
    )
    free = [_greedy(reference, prompt, None) for prompt in prompts]
    end = free[0][4]  # a token that some text ends with
    expected = [_greedy(reference, prompt, end) for prompt in prompts]
    task = generated.task(Named(open_artifact(small), end), sets, Generate(prompts=5, tokens=12, prompt_tokens=7))
    return task, prompts, expected


def _greedy(model, prompt, end) -> list[int]:
    options = {"eos_token_id": end} if end is not None else {"eos_token_id": []}
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    found = model.generate(
        prompt[None], attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )
    return found[0, len(prompt) :].tolist()


def test_prompt_sets_are_taken_from_in_turn(told):
    task, prompts, _ = told
    assert [len(of_set) for of_set in task.sets] == [3, 2]
    assert all(torch.equal(prompt, expected) for prompt, expected in zip(task.prompts, prompts, strict=True))


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_texts_are_those_of_greedy_generation(told, small, tmp_path, kind):
    task, _, expected = told
    path = (
        small if kind == "checkpoint" else exporting.export_checkpoint(small, "onnx", tmp_path / "onnx") / "model.onnx"
    )
    found = generated.generate("it", open_artifact(path), task)
    assert tokens_of(found) == expected
    assert len(expected[0]) <= 5, "one that ended"
    assert max(map(len, expected)) == 12, "one that did not"
    reference = load_reference(small)
    for text, prompt in zip(found, told[1], strict=True):
        logits = reference(torch.cat([prompt, torch.tensor(text.tokens)])[None]).logits[0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        assert text.entropies == pytest.approx((-log_p.exp() * log_p).sum(-1).tolist(), abs=1e-3)  # as that of a graph


def test_the_baselines_texts_are_written_once(told, small, monkeypatch):
    task, _, expected = told
    original = open_artifact(small)
    written = generated.of_baseline(original, original.sha256(), task)
    assert tokens_of(written) == expected
    monkeypatch.setattr(generated, "generate", lambda *_: pytest.fail("they are in the cache"))
    assert generated.of_baseline(original, original.sha256(), task) == written


def test_a_model_larger_than_memory_generates_the_same_and_says_what_it_costs(told, small, monkeypatch, capsys):
    task, _, expected = told
    monkeypatch.setattr("compress.runtime.inference.fits_in_memory", lambda model: False)
    monkeypatch.setattr(artifacts, "fits_in_memory", lambda model: False)
    assert tokens_of(generated.generate("checkpoint", open_artifact(small), task)) == expected
    said = capsys.readouterr().err
    assert "checkpoint: its weights do not fit into memory" in said
    assert "for each of 12 tokens" in said


def test_a_model_of_no_finite_logits_has_texts_nevertheless(told):
    """The check's own figures say that they are not finite, and fail."""
    task, _, expected = told

    class Broken:
        def step(self, ids):
            return torch.full((len(ids), 67), torch.nan)

    texts = generated._continued(Broken(), torch.stack([torch.arange(3)] * 2), task, lambda steps: None)
    before = [Text(tokens, [0.5] * len(tokens)) for tokens in expected[:2]]
    json.dumps(generated.figures("it", Task(((torch.zeros(1),) * 2,), 12, task.ends), before, texts), allow_nan=False)


# --- the command


def test_the_command_generates_where_it_is_asked_to(compress_cli, small):
    result = compress_cli("check", small, small, *QUICK, "--generate", 2, "--tokens", 5, "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = {row["figure"]: row for row in json.loads(result.stdout)["generated"]}
    assert {figure: row["texts"] for figure, row in rows.items()} == {
        "length": 2, "repeated_4grams": 2, "entropy": 2, "equal": 2, "first_difference": 0,
    }  # fmt: skip
    assert rows["equal"]["value"] == 1
    assert 0 < rows["length"]["baseline"] == rows["length"]["candidate"] <= 5
    assert json.loads(compress_cli("check", small, small, *QUICK, "--json", "-").stdout)["generated"] == []


@pytest.mark.parametrize(("arguments", "said"), [
    (("--generate", 0), "generate.prompts"), (("--generate", 2, "--tokens", 0), "generate.tokens"),
    (("--tokens", 5), "--generate"),
])  # fmt: skip
def test_texts_that_make_no_sense_are_refused(compress_cli, small, arguments, said):
    assert said in refusal_of_command(compress_cli("check", small, small, *QUICK, *arguments))


def test_apply_shows_texts_and_states(compress_cli, small, tmp_path):
    settings = ("check.prompts=[self]", "check.length=20", "check.samples=2", "check.generate={tokens: 6, prompt_tokens: 8}",
                "check.limits={}", "passes=[{state_precision: {ssm_state: int8, conv_state: fp16}}]")  # fmt: skip
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    planned = compress_cli("apply", "state-int8", "-m", small, "-o", tmp_path / "out", *arguments, "--dry-run")
    assert "generates 8 texts of up to 6 tokens, each from 8 tokens" in planned.output
    result = compress_cli("apply", "state-int8", "-m", small, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["artifact"] for row in report["generated"]} == {"checkpoint", "onnx"}
    assert {row["texts"] for row in report["generated"] if row["figure"] == "equal"} == {2}
    assert all(row["ratio"] == pytest.approx(1, abs=0.05) for row in report["state_health"])
    notes = {row["kind"]: row.get("note") for row in report["state_saturation"]}
    assert notes.keys() == {"ssm_state", "conv_state"}
    assert notes["ssm_state"].startswith("0 by construction")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<summary>Generated texts</summary>" in text
    assert "| ratio at 18 | saturated |" in text
    assert "| 0 (dynamic) |" in text
