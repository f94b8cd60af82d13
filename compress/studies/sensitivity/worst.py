"""The tensors whose own quantization costs most, found without measuring all of them."""

from compress.studies.sensitivity.cells import Cell
from compress.studies.sensitivity.findings import WorstTensor
from compress.studies.sensitivity.measure import Measure

COUNT = 10


def find(cells: list[Cell], measure: Measure, count: int = COUNT) -> list[WorstTensor]:
    """The `count` worst among the matrices of `cells`, worst first.

    Cells are taken by falling divergence, and their matrices measured one by one, until the next whole cell is below the
    last tensor that is kept. That assumes that a matrix alone costs no more than the cell it is in.
    """
    divergences = measure.all(cells, "cells in the recipe's formats")
    found: list[WorstTensor] = []
    for divergence, cell in sorted(zip(divergences, cells, strict=True), key=lambda pair: -pair[0]):
        if len(found) == count and divergence < found[-1]["kl_divergence_mean"]:
            break
        found = sorted(found + _tensors(cell, measure), key=lambda tensor: -tensor["kl_divergence_mean"])[:count]
    return found


def _tensors(cell: Cell, measure: Measure) -> list[WorstTensor]:
    alone = list(cell.tensors())
    values = measure.all(alone, f"tensors: {cell.unit.name} {cell.role}")
    return [
        WorstTensor(name=one.weights[0].name, format=one.stored, kl_divergence_mean=value, parameters=one.parameters)
        for one, value in zip(alone, values, strict=True)
    ]
