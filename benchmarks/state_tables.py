"""Tables of what `state_study.py` and `state_layers.py` measured: `python benchmarks/state_tables.py JSON`"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

KINDS = {"ssm": "ssm_state", "conv": "conv_state", "kv": "kv_cache"}
FIRST_BUCKET = 2  # of positions that is shown: those before it are short
LEAST = 1e-8  # of divergences: below it is float32's own noise

Facts = list[dict]  # of one configuration, a seed each


class Figures:
    """(model, text, length, prefill) -> configuration -> its facts by seed; recall: (model, "recall", distance, 1)."""

    def __init__(self, path: Path):
        self.whole = json.loads(path.read_text())
        self.by_place: dict[tuple, dict[str, Facts]] = defaultdict(lambda: defaultdict(list))
        self.traits: dict[str, dict[int, dict]] = defaultdict(dict)
        for key, facts in self.whole["figures"].items():
            if key.startswith(("bytes/", "agree/")):
                continue
            if key.startswith("traits/"):
                _, model, layer = key.split("/")
                self.traits[model][int(layer)] = facts
                continue
            model, text, length, prefill, rest = key.split("/", 4)
            self.by_place[model, text, int(length), int(prefill)][rest.rsplit("/", 1)[0]].append(facts)

    def recall(self, model: str, name: str) -> list[str]:
        """By distance."""
        places = sorted(place for place in self.by_place if place[:2] == (model, "recall"))
        return [
            over([f["accuracy"] for f in self.by_place[place][name]], 3) if name in self.by_place[place] else ""
            for place in places
        ]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def short(value: float) -> str:
    if abs(value) < LEAST:
        return "0"
    return f"{value:.2g}" if abs(value) < 0.001 else f"{value:.4f}"


def over(values: list[float], digits: int | None = None) -> str:
    """The mean over seeds, and how far they lie apart."""
    say = short if digits is None else lambda value: f"{value:.{digits}f}"
    apart = (
        f" ({say(min(values))} to {say(max(values))})"
        if len(values) > 1 and say(min(values)) != say(max(values))
        else ""
    )
    return say(float(np.mean(values))) + apart


def interval(edges: list[float] | None) -> str:
    return "" if edges is None else f"{edges[0]:.4f} to {edges[1]:.4f}"


def buckets(facts: Facts) -> list[tuple[str, float]]:
    """Mean KL by position, over seeds."""
    rows = [f["by_position"] for f in facts]
    return [
        (f"{row[0]['first']}-{row[0]['last']}", float(np.mean([r["kl_divergence_mean"] for r in row])))
        for row in zip(*rows, strict=True)
    ]


@dataclass(frozen=True)
class Point:
    """A configuration: bytes of one sequence at 4,096 tokens and what they were, of the one kind of state that it speaks of, or
    of all; mean KL."""

    kind: str
    size: int
    was: int
    kl: float
    name: str
    facts: Facts


def mean_of(place: tuple) -> str:
    """Which divergence counts: after a prompt that was read at once, that of the tokens decoded after it."""
    return "kl_late" if place[3] > 1 else "kl"


def points(figures: Figures, place: tuple, whole: bool = False) -> list[Point]:
    """Of a place, those of a kind together, from few bytes to many; `whole` counts all kinds for each. Layers alone aside."""
    found = []
    for name, facts in figures.by_place[place].items():
        kinds = {part.split()[0] for part in name.split(", ")}
        kind = "all" if whole or len(kinds) > 1 else KINDS[kinds.pop()]
        if facts[0]["group"] != "layers":
            was = figures.whole["figures"][f"bytes/{place[0]}"][kind]
            kl = float(np.mean([f[mean_of(place)] for f in facts]))
            found.append(Point(kind, facts[0]["bytes"][kind], was, kl, name, facts))
    return sorted(found, key=lambda point: (point.kind, point.size, point.kl))


def frontier(found: list[Point]) -> set[str]:
    """Names of those that no other of their kind beats with as few bytes."""
    best: dict[str, float] = {}
    names = set()
    for point in found:
        if point.kl < best.get(point.kind, float("inf")):
            best[point.kind] = point.kl
            names.add(point.name)
    return names


def by_configuration(figures: Figures, place: tuple) -> str:
    """One row a configuration; bold on the frontier of its kind."""
    found = points(figures, place)
    shown = slice(FIRST_BUCKET, None if place[3] == 1 else 0)  # a prompt read at once has no divergence to show
    late = [name for name, _ in buckets(found[0].facts)][shown]
    header = [
        "kept as",
        "bytes",
        "smaller",
        "mean KL",
        "drift",
        "95 %, first seed",
        "same top-1",
        *(f"KL {name}" for name in late),
    ]
    best, rows = frontier(found), []
    for point in sorted(found, key=lambda point: (point.kind, -point.size, -point.kl)):
        facts, mark = point.facts, "**" if point.name in best else ""
        wanted = ((mean_of(place), None), ("drift", 4), ("top1", 4))
        kl, drift, top1 = (over([f[key] for f in facts], digits) for key, digits in wanted)
        rows.append([
            f"{mark}{point.name}{mark}", f"{point.size:,}", f"{point.was / point.size:.2f}x", kl, drift,
            interval(facts[0]["drift_interval"]), top1 if place[3] == 1 else "",
            *(short(value) for _, value in buckets(facts)[shown]),
        ])  # fmt: skip
    return table(header, rows)


def pareto(figures: Figures, place: tuple) -> str:
    """Of all that is remembered, the frontier: from the largest to the smallest."""
    found = points(figures, place, whole=True)
    best = frontier(found)
    rows = [
        [
            p.name,
            f"{p.size:,}",
            f"{p.was / p.size:.2f}x",
            over([f["kl"] for f in p.facts]),
            over([f["drift"] for f in p.facts], 4),
        ]
        for p in reversed(found)
        if p.name in best
    ]
    return table(["kept as", "bytes at 4,096", "smaller", "mean KL", "drift"], rows)


def recalled(figures: Figures, model: str) -> str:
    places = sorted(place for place in figures.by_place if place[:2] == (model, "recall"))
    names = list(dict.fromkeys(name for place in places for name in figures.by_place[place]))
    baselines = [f"{next(iter(figures.by_place[place].values()))[0]['baseline']:.3f}" for place in places]
    header = ["kept as", *(f"{place[2]} tokens back" for place in places)]
    return table(header, [["float32", *baselines], *([name, *figures.recall(model, name)] for name in names)])


def sensitivities(figures: Figures, place: tuple) -> dict[str, dict[int, float]]:
    """Format -> layer -> mean KL of that layer alone."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for name, facts in figures.by_place[place].items():
        if match := re.match(r"ssm of layer (\d+) (.*)", name):
            found[match[2]][int(match[1])] = float(np.mean([f["kl"] for f in facts]))
    return found


def layers(figures: Figures, place: tuple) -> str:
    measured, traits = sensitivities(figures, place), figures.traits[place[0]]
    header = ["layer", *(f"KL, {name}" for name in measured), *next(iter(traits.values()))]
    rows = [
        [str(layer), *(short(of[layer]) for of in measured.values()), *(f"{v:.3g}" for v in traits[layer].values())]
        for layer in sorted(traits)
    ]
    return table(header, rows)


def ranks(figures: Figures, places: list[tuple]) -> str:
    """Spearman's rank correlation of each trait with the divergence: by model, and over the ranks of all together."""
    rows = []
    for trait in next(iter(figures.traits[places[0][0]].values())):
        cells = []
        for format in sensitivities(figures, places[0]):
            cells.append(", ".join(_correlations(figures, places, trait, format)))
        rows.append([trait, *cells])
    return table(["trait", *sensitivities(figures, places[0])], rows)


def _correlations(figures: Figures, places: list[tuple], trait: str, format: str) -> Iterator[str]:
    for place in places:
        measured, traits = sensitivities(figures, place)[format], figures.traits[place[0]]
        order = sorted(measured)
        yield f"{spearmanr([traits[i][trait] for i in order], [measured[i] for i in order]).statistic:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    figures = Figures(parser.parse_args().json)
    places = sorted(figures.by_place)
    for place in places:
        model, text, length, prefill = place
        if text == "recall":
            continue
        rows = figures.by_place[place]
        print(f"\n#### {model}, {text}, {length} tokens{f', {prefill} of them a prompt' if prefill > 1 else ''}\n")
        print(f"Perplexity of the original: {next(iter(rows.values()))[0]['perplexity']:.3f}\n")
        if points(figures, place):
            print(by_configuration(figures, place))
        if any(", " in name for name in rows):
            print(pareto(figures, place))
        if sensitivities(figures, place) and figures.traits[model]:
            print(layers(figures, place))
    for model in dict.fromkeys(place[0] for place in places if place[1] == "recall"):
        print(f"\n#### {model}, recall\n")
        print(recalled(figures, model))
    ranked = [place for place in places if sensitivities(figures, place) and figures.traits[place[0]]]
    if ranked:
        print(f"\n#### Ranks: {', '.join(place[0] for place in ranked)}\n")
        print(ranks(figures, ranked))


if __name__ == "__main__":
    main()
