"""Which layers can do with few bits, and does anything about them tell? `python benchmarks/state_layers.py --text FILE --out JSON`

Beside the figures that `state_study.py --groups layers` put there, one layer rounded at a time, this puts what could be known of a
layer without measuring that: from its weights, or from a look at its states while it reads. `state_tables.py` ranks them.
"""

import argparse
import json
from pathlib import Path

import torch
from state_decoding import Decoding, Tokens
from state_study import Original, Results, spread

from compress.checkpoint.reader import Checkpoint
from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.recipe.source import load_tokenizer
from compress.runtime.inference import empty_state, layer_weights

EVERY, FIRST = 16, 64  # tokens that are looked at
STEPS = 127  # of int8
SLOW = 0.99  # decay a token of what remembers long


class Watch:
    """Sums over the tokens looked at."""

    def __init__(self, a: torch.Tensor):
        """`a`: -exp(A_log), as it broadcasts over a state [N, D] or [heads, N, P]."""
        self._a, self._looks, self._sums = a, 0, dict[str, torch.Tensor]()

    def __call__(self, t: int, token: Tokens, state: torch.Tensor) -> None:
        if t < FIRST or t % EVERY:
            return
        decay, read = torch.exp(token.steps * self._a).expand_as(state), token.c[..., None]
        most = state.abs().amax(-2, keepdim=True)
        noise = (
            most / STEPS
        ).square() / 12  # of one rounding; what is left of all earlier ones, if they are independent:
        piled = noise / (1 - decay.square()).clamp_min(1e-4)
        self._add(
            mean_decay=decay.mean(), slow_share=(decay > SLOW).float().mean(), square=state.square().mean(),
            fourth=state.pow(4).mean(), crest=(most.squeeze(-2) / state.square().mean(-2).sqrt().clamp_min(1e-20)).mean(),
            piled=(piled * read.square()).sum(-2).mean(), given=(state * read).sum(-2).square().mean(),
            biased=(piled * read.square() / (1 - decay).clamp_min(1e-4)).sum(-2).mean(),
        )  # fmt: skip

    def _add(self, **found: torch.Tensor) -> None:
        self._looks += 1
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value

    def traits(self) -> dict[str, float]:
        mean = {name: float(total) / self._looks for name, total in self._sums.items()}
        return {
            "mean decay a token": mean["mean_decay"], f"entries that decay slower than {SLOW}": mean["slow_share"],
            "rms of the state": mean["square"] ** 0.5, "kurtosis": mean["fourth"] / mean["square"] ** 2,
            "largest / rms along d_state": mean["crest"],
            "piled-up rounding noise / scan output": mean["piled"] / mean["given"],
            "the same, errors of one sign": mean["biased"] / mean["given"],
        }  # fmt: skip


def traits_of(model: HybridModel, layer: Layer, hidden: torch.Tensor) -> dict[str, float]:
    weights = layer_weights(model, layer.index, "cpu")
    unit, prefix = model.unit(f"layer.{layer.index}"), layer.prefix
    a_log, bias = (
        next(weights(name.removeprefix(prefix)) for name in unit.weights if name.endswith(ends))
        for ends in ("A_log", ("dt_proj.bias", "dt_bias"))
    )
    a = -torch.exp(a_log.T if a_log.ndim == 2 else a_log[:, None, None])
    steps = torch.nn.functional.softplus(bias if a_log.ndim == 2 else bias[:, None, None])
    slow = float((torch.exp(steps * a) > SLOW).float().mean())
    watch = Watch(a)
    ops = Decoding(weights, layer, hear=watch)
    kept = empty_state(layer, hidden.shape[0], "cpu")
    after, _ = layer.residuals[0].run(
        ops, hidden, {spec.name: ops.state_in(spec, kept[spec.name]) for spec in layer.states}
    )
    share = float((after - hidden).square().mean().sqrt() / hidden.square().mean().sqrt())
    found = {
        "depth": float(layer.index),
        "mean A": float(-a.mean()),
        "slower by A and the bias of dt": slow,
        **watch.traits(),
        "output / residual stream": share,
    }
    noise = found["piled-up rounding noise / scan output"] ** 0.5
    return found | {"noise x output / residual stream": noise * share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[Path("models/tiny-jamba"), Path("models/tiny-nemotron-h")]
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    results = Results(given.out)
    for folder in given.models:
        model = Checkpoint(folder).model
        windows = spread(load_tokenizer(folder), given.text.read_text(), given.windows, given.length, given.length)
        original = Original(model, windows)
        for layer in model.layers:
            if any(spec.kind == "ssm_state" for spec in layer.states):
                found = traits_of(model, layer, original.entering[layer.index])
                results.add(("traits", folder.name, layer.index), found)
                print(folder.name, layer.index, json.dumps(found), flush=True)


if __name__ == "__main__":
    with torch.no_grad():  # compiled functions refuse inference mode
        main()
