"""What does it cost to keep states in few bits? `python benchmarks/state_study.py --text FILE --out RESULTS.json`

Every configuration of the groups asked for (`state_configurations.py`) against the original in float32, on windows spread
evenly over the text, or on the shipped held-out prompts (`--text heldout`): each decoded token by token (`state_decoding.py`).
`--groups recall` asks for facts instead, `layers` rounds one layer at a time, `prefill` rounds after a prompt of 4,096 tokens and
decodes 512. Figures go to the JSON as they come: what stands there is not measured again. `--tables` prints them;
`--agree` compares with `stream(..., decode=True)`.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import state_configurations as configurations
import torch
from machine import describe_machine
from state_decoding import decoded

from compress.calibration.walk import walk
from compress.check import figures, positions, recall
from compress.check.metrics import Scores, WindowScores, score
from compress.check.recall import Answer
from compress.checkpoint.reader import Checkpoint
from compress.model import sizes
from compress.model.hybrid import HybridModel
from compress.passes.state_precision import Options
from compress.passes.states import scales
from compress.passes.states.deciding import restated
from compress.prompts import passages
from compress.prompts.questions import Question
from compress.prompts.recall import at_distances
from compress.prompts.windows import encode, join_and_cut
from compress.recipe.check import DRIFT_FROM
from compress.recipe.source import load_tokenizer
from compress.runtime.inference import Head, embed, stream

SCRATCH = Path(os.environ.get("TMPDIR", "/tmp")) / "state-study"
CALIBRATION = (16, 512)  # windows and tokens of shipped prose that static scales are found from
PROMPT, AFTER = 4096, 512  # of the group `prefill`
BYTES_AT = 4096  # tokens
DISTANCES = (64, 512, 1900)


@dataclass
class Original:
    """The model in float32 on windows [W, S]: the hidden states that enter each layer, and those that leave the last."""

    model: HybridModel
    windows: torch.Tensor
    entering: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entering.append(embed(self.model, self.windows))
        for index in range(self.model.config.num_hidden_layers):
            self.entering.append(decoded(self.model, index, self.entering[-1], self.windows.shape[1]))

    def with_states(self, model: HybridModel, prefill: int) -> torch.Tensor:
        """What leaves the last layer where states are kept so; layers before the first of them are as they were."""
        first = min((state.layer for state in model.config.compress.states), default=0)
        hidden = self.entering[first]
        for index in range(first, model.config.num_hidden_layers):
            hidden = decoded(model, index, hidden, prefill)
        return hidden


class Kept:
    """The model with its states kept as options say; static scales from the shipped prose."""

    def __init__(self, model: HybridModel, tokenizer):
        samples, length = CALIBRATION
        self._model = model
        self._prose = join_and_cut(tokenizer, passages.shipped("prose"), samples, length, seed=0)
        self._scaled: dict[str, HybridModel] = {}

    def so(self, said: configurations.Options, seed: int) -> HybridModel:
        options, name = Options.model_validate(said), configurations.name(said)
        model = restated(options, self._model, seed)
        if "static" not in name:
            return model
        if name not in self._scaled:
            found = {
                u.name: scales.found(options, u, inputs)[0]
                for u, inputs in walk(self._model, self._prose, SCRATCH, "cpu")
            }
            self._scaled[name] = replace(model, units=tuple(found.get(unit.name, unit) for unit in model.units))
        return replace(model, units=self._scaled[name].units)


def spread(tokenizer, text: str, count: int, length: int, longest: int) -> torch.Tensor:
    """[count, length] tokens that begin at places spread evenly over a text, the same for every length up to `longest`."""
    tokens = encode(tokenizer, text)
    starts = np.linspace(0, len(tokens) - longest, count).astype(int)
    return torch.stack([torch.tensor(tokens[start : start + length]) for start in starts])


def scored(original: Original, hidden: torch.Tensor) -> list[WindowScores]:
    """Position 0 is not scored: no state lies before it."""
    head, found = Head(original.model, "cpu"), []
    for ids, was, now in zip(original.windows, original.entering[-1], hidden, strict=True):
        log_p = torch.log_softmax(head(was[1:-1]), -1)
        found.append(WindowScores(2, score(log_p, head(now[1:-1]), ids[2:])))
    return found


def facts_of(windows: list[WindowScores], drift_from: int) -> dict:
    """Figures as the JSON has them."""
    whole = [window.scores for window in windows]
    late = positions.between([windows], drift_from, float("inf"))
    kl, drift = figures.of("kl_divergence_mean", [whole]), figures.of("perplexity_ratio", late)
    together, last = Scores.concatenate(whole), Scores.concatenate(late[0])
    return {
        "kl": kl.value, "kl_interval": kl.interval, "drift": drift.value, "drift_interval": drift.interval,
        "kl_late": float(last.kl_divergence.mean()), "kl_p99": float(np.percentile(together.kl_divergence, 99)),
        "top1": float(together.same_top1.mean()), "perplexity": float(np.exp(together.nll_baseline.mean())),
        "by_position": positions.by_position("", "decode", [windows]),
    }  # fmt: skip


def bytes_of(model: HybridModel) -> dict[str, int]:
    """Of one sequence after `BYTES_AT` tokens, by kind; what config.json does not speak of as its published form has it."""
    memory = sizes.state_bytes(model.architecture)
    ssm, conv, cache = memory.ssm_state_bytes, memory.conv_state_bytes, BYTES_AT * memory.kv_bytes_per_token
    return {"ssm_state": ssm, "conv_state": conv, "kv_cache": cache, "all": ssm + conv + cache}


class Results:
    """The JSON file; a figure stands there as soon as it is known."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, dict] = json.loads(path.read_text())["figures"] if path.exists() else {}

    def add(self, key: tuple, facts: dict) -> None:
        self.found["/".join(map(str, key))] = facts
        whole = {"machine": describe_machine(), "figures": self.found}
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(whole))
        beside.replace(self._path)

    def has(self, key: tuple) -> bool:
        return "/".join(map(str, key)) in self.found


class Study:
    """One model, one text."""

    def __init__(self, arguments: argparse.Namespace):
        self.model = Checkpoint(arguments.model).model
        self._tokenizer, self._arguments = load_tokenizer(arguments.model), arguments
        self._kept, self._results = Kept(self.model, self._tokenizer), Results(arguments.out)
        self._name, self._text = arguments.model.name, Path(arguments.text).stem
        self._longest = max(*arguments.lengths, PROMPT + AFTER)

    def run(self) -> None:
        self._results.add(("bytes", self._name), bytes_of(self.model))
        for group in self._arguments.groups:
            {"recall": self._recall, "prefill": self._prefill}.get(group, self._windows)(group)

    def agree(self) -> None:
        """How far the fast way is from decoding every layer token by token: mean KL between the two, 8 windows of 128 tokens."""
        windows = self._read(128)
        original, head = Original(self.model, windows), Head(self.model, "cpu")
        SCRATCH.mkdir(parents=True, exist_ok=True)
        for said in configurations.EACH_FORM:
            model = self._kept.so(said, seed=0)
            slow = torch.cat([hidden for _, hidden in stream(model, list(windows), SCRATCH, decode=True)])
            p, q = (torch.log_softmax(head(hidden), -1) for hidden in (slow, original.with_states(model, prefill=1)))
            found = float((p.exp() * (p - q)).sum(-1).mean())
            self._results.add(("agree", self._name, configurations.name(said)), {"kl": found})
            print(self._name, configurations.name(said), f"{found:.2g}", flush=True)

    def _lines(self, group: str) -> list[configurations.Options]:
        if group in configurations.GROUPS:
            return configurations.GROUPS[group]
        having = [
            [x.index for x in self.model.layers if any(s.kind == k for s in x.states)]
            for k in ("ssm_state", "kv_cache")
        ]
        return configurations.BY_LAYER[group](*having)

    def _read(self, length: int) -> torch.Tensor:
        if self._text != "heldout":
            return spread(
                self._tokenizer, Path(self._arguments.text).read_text(), self._arguments.windows, length, self._longest
            )
        cut = join_and_cut(self._tokenizer, passages.shipped("heldout"), self._arguments.windows, length, seed=0)
        return torch.stack([window for window in cut if len(window) == length])

    def _windows(self, group: str) -> None:
        for length in self._arguments.lengths:
            self._measure(group, self._read(length), length, 1, self._lines(group))

    def _prefill(self, group: str) -> None:
        self._measure(group, self._read(PROMPT + AFTER), PROMPT + AFTER, PROMPT, self._lines(group))

    def _measure(self, group: str, windows: torch.Tensor, length: int, prefill: int, lines: list) -> None:
        original, drift_from = None, DRIFT_FROM if prefill == 1 else prefill + 1
        for said, seed in self._asked(lines):
            key = (self._name, self._text, length, prefill, configurations.name(said), seed)
            if self._results.has(key):
                continue
            original = original or Original(self.model, windows)
            began, model = time.monotonic(), self._kept.so(said, seed)
            facts = facts_of(scored(original, original.with_states(model, prefill)), drift_from)
            self._note(key, {"group": group, **facts, "bytes": bytes_of(model)}, began)

    def _asked(self, lines: list) -> Iterator[tuple[configurations.Options, int]]:
        for said in lines:
            if self._arguments.only in configurations.name(said):
                seeds = self._arguments.seeds if configurations.is_random(said) else self._arguments.seeds[:1]
                yield from ((said, seed) for seed in seeds)

    def _note(self, key: tuple, facts: dict, began: float) -> None:
        facts["seconds"] = round(time.monotonic() - began, 1)
        self._results.add(key, facts)
        shown = {name: facts[name] for name in ("kl", "drift", "accuracy", "drop", "seconds") if name in facts}
        print("/".join(map(str, key)), {name: float(f"{value:.5g}") for name, value in shown.items()}, flush=True)

    def _recall(self, group: str) -> None:
        for distance in self._arguments.distances:
            asked = at_distances(
                self._tokenizer, passages.shipped("heldout"), [distance], self._arguments.trials, seed=0
            )
            longest = max(map(len, asked.windows))
            windows = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for w in asked.windows])
            original, was = Original(self.model, windows), None
            for said, seed in self._asked(self._lines(group)):
                key = (self._name, "recall", distance, 1, configurations.name(said), seed)
                if not self._results.has(key):
                    was = was or _right(original, asked.questions, original.entering[-1])
                    began, model = time.monotonic(), self._kept.so(said, seed)
                    now = _right(original, asked.questions, original.with_states(model, 1))
                    self._note(key, {"group": group, **_recalled(asked.questions, was, now)}, began)


def _right(original: Original, questions: tuple[Question, ...], hidden: torch.Tensor) -> list[bool]:
    """Whether the most likely token was the answer."""
    before = torch.stack([hidden[question.window, question.position - 1] for question in questions])
    given = Head(original.model, "cpu")(before).argmax(-1)
    return [int(given[i]) == int(original.windows[q.window, q.position]) for i, q in enumerate(questions)]


def _recalled(questions: tuple[Question, ...], was: list[bool], now: list[bool]) -> dict:
    lost = recall.drop([[Answer(*each) for each in zip(questions, was, now, strict=True)]])
    return {"baseline": float(np.mean(was)), "accuracy": float(np.mean(now)), "drop": lost.value, "drop_interval": lost.interval,
            "trials": len(now)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-jamba"))
    parser.add_argument("--text", default="heldout", help="A .txt file, or `heldout`.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--windows", type=int, default=8, help="Of each length.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--groups", nargs="+", default=["recurrent"], choices=[*configurations.GROUPS, *configurations.BY_LAYER]
    )
    parser.add_argument("--only", default="", help="Part of a configuration's name.")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES)
    parser.add_argument("--trials", type=int, default=400, help="Of recall, for each distance.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--agree", action="store_true", help="Compare with `stream(..., decode=True)` instead.")
    arguments = parser.parse_args()
    with torch.no_grad():  # compiled functions refuse inference mode
        study = Study(arguments)
        study.agree() if arguments.agree else study.run()


if __name__ == "__main__":
    main()
