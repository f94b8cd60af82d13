"""Tables of what `state_study.py` and `state_layers.py` measured: `python benchmarks/state_tables.py JSON`"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
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


def by_configuration(figures: Figures, place: tuple, groups: set[str]) -> str:
    """One row a configuration, with the bytes of the kind of state that it speaks of, or of all."""
    chosen = {name: facts for name, facts in figures.by_place[place].items() if facts[0]["group"] in groups}
    names = [name for name, _ in buckets(next(iter(chosen.values())))][FIRST_BUCKET:]
    header = [
        "kept as",
        "bytes",
        "smaller",
        "mean KL",
        "drift",
        "95 %, first seed",
        "same top-1",
        *(f"KL {name}" for name in names),
    ]
    rows = []
    for name, facts in chosen.items():
        size, was = sizes_of(figures, place[0], name, facts)
        late = [short(value) for _, value in buckets(facts)][FIRST_BUCKET:]
        rows.append([name, f"{size:,}", f"{was / size:.2f}x", over([f["kl"] for f in facts]), over([f["drift"] for f in facts], 4),
                     interval(facts[0]["drift_interval"]), over([f["top1"] for f in facts], 4), *late])  # fmt: skip
    return table(header, rows)


def sizes_of(figures: Figures, model: str, name: str, facts: Facts) -> tuple[int, int]:
    """Bytes of one sequence at 4,096 tokens, and what they were: of one kind of state, or of all where it speaks of several."""
    kinds = {part.split()[0] for part in name.split(", ")}
    kind = KINDS[kinds.pop()] if len(kinds) == 1 else "all"
    return facts[0]["bytes"][kind], figures.whole["figures"][f"bytes/{model}"][kind]


def frontier_of_states(figures: Figures, place: tuple) -> str:
    """Of recurrent states alone, from the largest to the smallest; bold where none is both smaller and nearer."""
    points = []
    for name, facts in figures.by_place[place].items():
        if name.startswith("ssm") and "," not in name and "of layer" not in name:
            points.append((*sizes_of(figures, place[0], name, facts), float(np.mean([f["kl"] for f in facts])), name))
    rows, best = [], float("inf")
    for size, was, kl, name in sorted(points, key=lambda point: (point[0], point[2])):
        mark = "**" if kl < best else ""
        best = min(best, kl)
        rows.append([f"{mark}{name.removeprefix('ssm ')}{mark}", f"{size:,}", f"{was / size:.2f}x", short(kl)])
    return table(["recurrent state kept as", "bytes", "smaller", "mean KL"], reversed(rows))


def recalled(figures: Figures, model: str) -> str:
    places = sorted(place for place in figures.by_place if place[:2] == (model, "recall"))
    names = list(dict.fromkeys(name for place in places for name in figures.by_place[place]))
    baselines = [f"{next(iter(figures.by_place[place].values()))[0]['baseline']:.3f}" for place in places]
    header = ["kept as", *(f"{place[2]} tokens back" for place in places)]
    return table(header, [["float32", *baselines], *([name, *figures.recall(model, name)] for name in names)])


def pareto(figures: Figures, place: tuple, base: int) -> str:
    """Every configuration that no other beats in both bytes and divergence, from the largest to the smallest."""
    points = [(facts[0]["bytes"]["all"], float(np.mean([f["kl"] for f in facts])), name, facts)
              for name, facts in figures.by_place[place].items() if "of layer" not in name]  # fmt: skip
    rows, best = [], float("inf")
    for size, kl, name, facts in sorted(points, key=lambda point: point[:2]):
        if kl < best:
            best = kl
            rows.append([name, f"{size:,}", f"{base / size:.2f}x", short(kl), over([f["drift"] for f in facts], 4)])
    return table(["kept as", "bytes at 4,096", "smaller", "mean KL", "drift"], reversed(rows))


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
        groups = {facts[0]["group"] for facts in rows.values()} - {"layers"}
        if groups:
            print(by_configuration(figures, place, groups))
            base = figures.whole["figures"][f"bytes/{model}"]["all"]
            print(frontier_of_states(figures, place))
            print(pareto(figures, place, base))
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
