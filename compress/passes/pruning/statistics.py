"""What calibration tells of the experts of one layer.

Every fourth stretch of STRETCH tokens is withheld: scores and corrections are made from the others, and judged on these.
Errors of a token count relative to |h|^2, h [H] being what the layer leaves of it, and times m^2, m being the factor that what
the experts give is added with: the norms that follow divide by |h|, so that an error of the layer means the same for every
token and in every layer.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from compress.calibration.inputs import LayerInputs
from compress.errors import InputError
from compress.model.routing import Router
from compress.model.weight import Unit, is_finite
from compress.runtime.eager import Eager
from compress.runtime.inference import HiddenStates

STRETCH, WITHHELD_OF = 64, 4
SAMPLE_TOKENS = 8192  # withheld tokens that every expert is run on, at most
GRAM_ELEMENTS = 1 << 25  # of inner products between experts' outputs that are kept: 128 MiB
OUTPUT_ELEMENTS = 1 << 26  # of all experts' outputs on sampled tokens that are in memory together: 256 MiB
TARGET = "target"  # scratch states: what the layer's experts give together


@dataclass(frozen=True)
class Statistics:
    """T tokens, E experts; n of the withheld tokens are a sample on which all experts were run."""

    router: Router
    bias: torch.Tensor | None  # [E], the router's correction of scores
    logits: torch.Tensor  # [T, E], of the router
    norms: torch.Tensor  # [T, E], of an expert's output, where the token is routed to it
    importance: torch.Tensor  # [T], m^2 / |h|^2
    withheld: torch.Tensor  # [T], bool
    sample: torch.Tensor  # [n], which tokens
    gram: torch.Tensor  # [n, E, E], inner products of the experts' outputs

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def gates(self) -> torch.Tensor:
        """[T, E]: the raw gates of the layer as it came, zero for experts a token is not routed to."""
        return self.router.gates(self.logits, self.experts, self.bias)

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens routed to each expert."""
        return self.gates.bool().sum(0).tolist()

    def similarity(self) -> torch.Tensor:
        """[E, E]: cosine of the experts' outputs over the sample, tokens weighted by importance."""
        inner = (self.gram * self.importance[self.sample, None, None]).sum(0)
        norms = inner.diagonal().clamp_min(1e-30).sqrt()
        return inner / norms[:, None] / norms


def collect(unit: Unit, inputs: LayerInputs) -> Statistics:
    """One replay of the part of the layer with experts. Leaves what they give together in the scratch states `target`."""
    experts = inputs.experts.count
    target = given_states(unit, inputs, TARGET)
    withheld = _withheld(target)
    if not bool(withheld.any()) or bool(withheld.all()):
        raise InputError(
            f"calibration: {len(withheld)} tokens are too few to withhold some from fitting; "
            f"give at least {WITHHELD_OF} windows, or longer ones"
        )
    sampled = _sampled(withheld, experts)
    collector = _Collector(inputs, inputs.operators(unit), target)
    first = 0
    for number, hidden, x in inputs.expert_blocks(unit):
        rows = x.flatten(0, 1)
        collector.add(number, hidden, rows, sampled[first : first + len(rows)].to(rows.device))
        first += len(rows)
    return collector.statistics(withheld, sampled)


def given_states(unit: Unit, inputs: LayerInputs, name: str) -> HiddenStates:
    """Room for what experts give, [b, S, K], before the block projects it out of their space, where it has one."""
    experts = inputs.experts
    down = inputs.prefix + experts.prefix(0) + experts.parts[-1]
    return inputs.scratch(name).of_width(unit.weights[down].shape[0])


def _withheld(states: HiddenStates) -> torch.Tensor:
    """Every fourth stretch of a window; which one of four changes from window to window."""
    masks = []
    for block, (windows, length, _) in zip(states.blocks, states.shapes, strict=True):
        stretch = torch.arange(length) // STRETCH + torch.tensor(block).reshape(windows, 1)
        masks.append((stretch % WITHHELD_OF == WITHHELD_OF - 1).flatten())
    return torch.cat(masks)


def _sampled(withheld: torch.Tensor, experts: int) -> torch.Tensor:
    """[T], bool: an even choice of the withheld tokens."""
    most = max(1, min(SAMPLE_TOKENS, GRAM_ELEMENTS // experts**2))
    places = withheld.nonzero()[:, 0]
    chosen = torch.zeros_like(withheld)
    chosen[places[:: -(-len(places) // most)]] = True
    return chosen


def _parts(sampled: torch.Tensor, most: int) -> list[slice]:
    """A block of tokens in parts that hold so many sampled ones at most."""
    places = sampled.nonzero()[:, 0].tolist()
    cuts = [0, *places[most::most], len(sampled)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


class _Collector:
    """Adds up the statistics block by block, one expert's weights at a time."""

    def __init__(self, inputs: LayerInputs, ops: Eager, target: HiddenStates):
        self._experts, self._ops, self._target = inputs.experts, ops, target
        self._name, self._router = f"layer {inputs.index}", inputs.experts.router
        self._factor = inputs.layer.experts_factor
        self._bias = None if self._router.bias is None else ops.weights(self._router.bias)
        self._logits: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._importance: list[torch.Tensor] = []
        self._gram: list[torch.Tensor] = []

    def add(self, number: int, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> None:
        """hidden [b, S, H], rows [b S, H] (what the experts see), sampled [b S]."""
        most = max(1, OUTPUT_ELEMENTS // (self._experts.count * rows.shape[1]))
        left = hidden.flatten(0, 1)
        given = [self._add_some(left[part], rows[part], sampled[part]) for part in _parts(sampled, most)]
        self._target.write(number, torch.cat(given).view(self._target.shapes[number]))

    def _add_some(self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Some tokens of a block, [n, H] each; returns what the experts give them together, in their own space."""
        experts, ops = self._experts, self._ops
        logits = ops.router_logits(rows, self._router)
        gates = self._router.gates(logits, experts.count, self._bias)
        seen, norms = experts.inputs(ops, rows), torch.zeros_like(gates)
        given = torch.zeros_like(seen)
        outputs = torch.zeros(int(sampled.sum()), experts.count, rows.shape[1], device=rows.device)
        for e in range(experts.count):
            wanted = (sampled | (gates[:, e] > 0)).nonzero()[:, 0]
            output = experts.run_one(ops, e, seen[wanted])
            given.index_add_(0, wanted, output * gates[wanted, e, None])
            output = experts.output(ops, output)
            norms[wanted, e] = output.norm(dim=1) * (gates[wanted, e] > 0)
            outputs[:, e] = output[sampled[wanted]]
        self._logits.append(logits)
        self._norms.append(norms)
        left = self._left(hidden, rows, given).square().sum(1).clamp_min(1e-30)
        self._importance.append(self._factor**2 / left)
        self._gram.append(outputs @ outputs.transpose(1, 2))
        return given

    def _left(self, hidden: torch.Tensor, rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What the layer leaves of the tokens, [n, H], but for what stands beside the whole block or follows it."""
        left = hidden + self._factor * self._experts.output(self._ops, given)
        beside = self._experts.beside(self._ops, rows)
        return left if beside is None else left + self._factor * beside

    def statistics(self, withheld: torch.Tensor, sampled: torch.Tensor) -> Statistics:
        logits, norms, importance, gram = map(torch.cat, (self._logits, self._norms, self._importance, self._gram))
        if not all(map(is_finite, (logits, norms, importance, gram))):
            raise InputError(f"{self._name}: its experts give NaN or infinity on the calibration tokens")
        device = logits.device
        return Statistics(
            self._router,
            self._bias,
            logits,
            norms,
            importance,
            withheld.to(device),
            sampled.nonzero()[:, 0].to(device),
            gram,
        )
