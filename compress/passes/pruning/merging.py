"""Merging: experts that would be removed go into the kept one whose outputs are most like theirs.

Hidden units of an expert have no order, so those of the two are matched first, by their weights (Ainsworth et al., Git
Re-Basin, arXiv 2209.04836; for experts Li et al., M-SMoE, arXiv 2310.01334): the assignment that maximises the summed
products of rows of gate and up and of columns of down. Then they are averaged, weighted by how much each was used.
"""

from collections.abc import Iterable

import torch
from scipy.optimize import linear_sum_assignment

from compress import parallel
from compress.calibration.inputs import LayerInputs
from compress.checkpoint.writer import ShardWriter
from compress.model.weight import PLAIN_DTYPES, Unit
from compress.passes.pruning.reconstruction import Kept
from compress.passes.pruning.removal import expert_stem, rows_of

# by their names within an expert, in the order of `Experts.parts`: those on its input [F, H], at last the one that gives its
# output [H, F]
Matrices = dict[str, torch.Tensor]


def groups(similarity: torch.Tensor, kept: Kept) -> list[list[int]]:
    """For each kept expert, itself and the removed ones most similar [E, E] to it."""
    members = [[expert] for expert in kept]
    for expert in range(len(similarity)):
        if expert not in kept:
            members[int(similarity[expert, list(kept)].argmax())].append(expert)
    return members


def merge(source: Unit, pruned: Unit, inputs: LayerInputs, members: list[list[int]], usage: list[float],
          stash: ShardWriter) -> Unit:  # fmt: skip
    """`pruned` with every kept expert the average of its group; `usage` [E] are the weights, written by `stash`."""
    for position, group in enumerate(members):
        if len(group) == 1:
            continue
        merged = average((_matrices(source, inputs, e) for e in group), [usage[e] for e in group])
        for part, tensor in merged.items():
            weight = pruned.weights[expert_stem(inputs, position) + part]
            new = weight.with_load(weight.format, rows_of(tensor.to(PLAIN_DTYPES[weight.format])))
            stash.write(new)
            pruned = pruned.replaced(stash.written(new))
    return pruned


def average(experts: Iterable[Matrices], usage: list[float]) -> Matrices:
    """The first expert and the others, their hidden units in its order, weighted by `usage` (alike where all are zero).

    The experts are taken one at a time: no more than two and their sum are in memory.
    """
    total = sum(usage)
    shares = [share / total for share in usage] if total > 0 else [1 / len(usage)] * len(usage)
    first, *rest = shares
    experts = iter(experts)
    leading = next(experts)
    merged = {part: first * tensor for part, tensor in leading.items()}
    for share, expert in zip(rest, experts, strict=True):
        for part, tensor in aligned(expert, leading).items():
            merged[part] += share * tensor
    return merged


def aligned(expert: Matrices, to: Matrices) -> Matrices:
    """An expert with its hidden units in the order in which they are most like those of another."""
    *entering, down = expert
    likeness = sum(parallel.linear(_unit_norm(to[p]), _unit_norm(expert[p])) for p in entering)
    likeness = likeness + parallel.linear(_unit_norm(to[down]).T, _unit_norm(expert[down]).T)
    order = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
    return {part: expert[part][order] for part in entering} | {down: expert[down][:, order]}


def _unit_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Of Frobenius norm 1, so that all matrices count alike."""
    norm: torch.Tensor = matrix.norm()
    return matrix / norm.clamp_min(1e-30)


def _matrices(unit: Unit, inputs: LayerInputs, expert: int) -> Matrices:
    return {part: unit.weights[expert_stem(inputs, expert) + part].dense() for part in inputs.experts.parts}
