"""Of the `compress` section of config.json: what pruning left that the model's one number of experts cannot say.

Stock runtimes do not read it. They stop at such a checkpoint, since the shapes are not those that this number implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from compress.errors import InputError
from compress.strict.json_text import JsonObject

if TYPE_CHECKING:
    from compress.model.hybrid import HybridModel

SECTION = "compress"
MAX_ROUTER_ROWS = 10_000  # as many as a model may have experts; keeps a corrupt config from promising a huge matrix


class ExpertCounts(BaseModel):
    """`num_experts_per_layer`: of every layer, 1 where it has none. `router_rows`: of every router, those of
    removed experts included, which come after the rows of the experts that are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts_per_layer: tuple[StrictInt, ...] | None = None
    router_rows: StrictInt | None = Field(default=None, ge=1, le=MAX_ROUTER_ROWS)

    @property
    def is_uniform(self) -> bool:
        """Whether `num_experts` says it all."""
        return self.num_experts_per_layer is None and self.router_rows is None

    def of_layer(self, index: int, num_experts: int) -> int:
        """Experts of an MoE layer."""
        return num_experts if self.num_experts_per_layer is None else self.num_experts_per_layer[index]

    def refuse_unfit(self, moe: list[bool], num_experts: int, top_k: int) -> None:
        """Raises ValueError for counts that are not those of a model with MoE layers where `moe` is true.

        A layer keeps at least two experts, since to runtimes one means a dense feed-forward, and at least the top-k.
        """
        counts = self.num_experts_per_layer
        if counts is not None:
            if len(counts) != len(moe):
                raise ValueError(f"num_experts_per_layer lists {len(counts)} layers, the model has {len(moe)}")
            for index, (count, is_moe) in enumerate(zip(counts, moe, strict=True)):
                least, most = (max(2, top_k), num_experts) if is_moe else (1, 1)
                if not least <= count <= most:
                    expected = _range(least, most) + ("" if is_moe else " (it has no experts)")
                    raise ValueError(f"num_experts_per_layer[{index}] is {count}, expected {expected}")
        if self.router_rows is not None and not any(moe):
            raise ValueError(f"router_rows is {self.router_rows}, but no layer has a router")
        if self.router_rows is not None and self.router_rows < num_experts:
            raise ValueError(f"router_rows is {self.router_rows}, fewer than the {num_experts} experts of a layer")


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def pruned(
    values: JsonObject, keys: tuple[str, ...], moe: dict[int, int], layers: int, router_rows: int | None
) -> JsonObject:
    """config.json for a model whose MoE layers (by index) keep so many experts, their number standing under those of `keys`
    that are there, else under the first; `router_rows` where removed ones stay in the denominator."""
    counts, stated = set(moe.values()), [key for key in keys if key in values] or keys[:1]
    came = values.get(SECTION)
    section: JsonObject = dict(came) if isinstance(came, Mapping) else {}
    section = {name: value for name, value in section.items() if name not in ExpertCounts.model_fields}
    section |= {} if router_rows is None else {"router_rows": router_rows}
    if len(counts) > 1:
        section = {"num_experts_per_layer": [moe.get(index, 1) for index in range(layers)]} | section
    rest = {name: value for name, value in values.items() if name != SECTION}
    return rest | dict.fromkeys(stated, max(counts)) | ({SECTION: section} if section else {})


def fewest(top_k: int) -> int:
    """Experts that must stay in a layer: those a token goes to, and two, since one is a dense feed-forward to runtimes."""
    return max(2, top_k)


def of_model(model: HybridModel) -> dict[int, int]:
    """Experts of every MoE layer of an opened model, by the layer's index."""
    return {layer.index: layer.num_experts for layer in model.layers if layer.experts}


def refuse_unprunable(model: HybridModel, what: str) -> dict[int, int]:
    """`of_model`, of one that has experts and was not pruned to what only we can run. `what` begins the sentence."""
    counts = of_model(model)
    if not counts:
        raise InputError(f"{what}: the model has no experts")
    if not model.architecture.EXPERTS_KEYS:
        raise InputError(f"{what}: EXPERTS_KEYS of {model.model_type} names no key of config.json that counts experts")
    if not model.config.compress.is_uniform:
        raise InputError(
            f"{what}: the model was pruned before, by an earlier pass or run, to layers that differ or keep router rows; "
            "start from the original"
        )
    return counts


def changes(before: HybridModel, after: HybridModel) -> list[str]:
    """What happened to the experts between two opened models, as sentences; none where nothing did."""
    whole, left = of_model(before), of_model(after)
    if whole == left:
        return []
    said = f"{sum(left.values())} of {sum(whole.values())} experts stay: {_per_layer(left)} of {_per_layer(whole)} in a layer."
    if after.config.compress.is_uniform:
        return [said]
    return [said, "Stock runtimes stop at this model; compress.load, compress run and the ONNX export run it."]


def _per_layer(counts: dict[int, int]) -> str:
    least, most = min(counts.values()), max(counts.values())
    return str(most) if least == most else f"{least} to {most}"
