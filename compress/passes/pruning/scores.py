"""How much an expert matters, from the tokens routed to it: the higher, the more. Gates are raw, as the layer uses them.

Only tokens that are not withheld count. All are functions of the gates g and the outputs' norms |f| [T, E]:

- `frequency`: share of the tokens that are routed to the expert;
- `mean_gate`: mean of g over all tokens (soft counting, as in SEER-MoE, arXiv 2404.05089);
- `ean`: sum of |f| over its tokens (expert activation norm, a baseline of REAP, arXiv 2510.13999);
- `reap`: mean of g |f| over its tokens (router-weighted expert activation pruning, arXiv 2510.13999).
"""

import torch

from compress.passes.pruning.statistics import Statistics

NAMES = ("frequency", "mean_gate", "ean", "reap")


def of(name: str, statistics: Statistics) -> torch.Tensor:
    """[E]; an expert that no token is routed to scores zero."""
    gates, norms = statistics.gates[~statistics.withheld], statistics.norms[~statistics.withheld]
    routed = gates > 0
    if name == "frequency":
        return routed.float().mean(0)
    if name == "mean_gate":
        return gates.mean(0)
    if name == "ean":
        return (norms * routed).sum(0)
    return (gates * norms).sum(0) / routed.sum(0).clamp_min(1)
