"""Why rounding to nearest piles up in Mamba-1 and not in Mamba-2: `python benchmarks/state_decays.py`

A scan with random inputs, its state rounded after every token with one dynamic scale over the states of a channel: once with the
decays 1 to 16 that Mamba-1 gives them, once with the same decay for all, as in a head of Mamba-2. Prints the squared error of
what is read from the state, relative to it.
"""

import json
import sys

import torch
from machine import describe_machine

from compress.formats.remembered import Precision, decode, encode

CHANNELS, STATES, TOKENS, FIRST = 512, 16, 1500, 200
DECAYS = {"1 to 16": torch.arange(1.0, STATES + 1)[:, None], "4 for all": torch.full((STATES, 1), 4.0)}
STEPS = {"time steps about 0.03, inputs of both signs": (-3.5, 0.3), "about 0.004, few inputs": (-5.5, 0.05)}


def error(precision: Precision, decays: torch.Tensor, log_step: float, fed: float) -> float:
    """`fed`: the share of tokens at which a channel has an input."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    exact = kept = torch.zeros(1, STATES, CHANNELS)
    mean_steps, lost, read = torch.exp(noise(CHANNELS) + log_step), 0.0, 0.0
    for t in range(1, TOKENS):
        steps = mean_steps * torch.exp(0.7 * noise(CHANNELS))
        given = noise(CHANNELS) * (torch.rand(CHANNELS, generator=generator) < fed)
        added, c = noise(STATES)[:, None] * (steps * given), noise(STATES)[:, None]
        exact, after = (torch.exp(-steps * decays) * state + added for state in (exact, kept))
        if t > FIRST:
            lost += float((c * (after - exact)).sum(1).square().mean())
            read += float((c * exact).sum(1).square().mean())
        kept = decode(encode(after, precision, torch.full((1, 1, 1), t)), precision, STATES)
    return lost / read


def main() -> None:
    print("| inputs | decays | format | nearest | stochastic | nearest / stochastic |\n|---|---|---|---|---|---|")
    for inputs, (log_step, fed) in STEPS.items():
        for name, decays in DECAYS.items():
            for format in ("int8", "int4"):
                kept = (Precision(format, rounding, axis=-2) for rounding in ("nearest", "stochastic"))
                nearest, stochastic = (error(precision, decays, log_step, fed) for precision in kept)
                print(
                    f"| {inputs} | {name} | {format} | {nearest:.2g} | {stochastic:.2g} | {nearest / stochastic:.2f} |",
                    flush=True,
                )
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    with torch.no_grad():
        main()
