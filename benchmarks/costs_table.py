"""The table of `compress/check/costs.py` from what was measured: `python benchmarks/costs_table.py FOLDER`.

FOLDER has `PART-MODEL.json` of benchmarks/default_limits.py, and `even/RECIPE-MODEL-ck.npz` of benchmarks/candidate_scores.py for
recipes that round with GPTQ, from which its part of rounding to nearest follows. Prints a block for each model.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from default_limits import AT_ONCE

GPTQ = {"int8": "int8", "int4-g32": "int4-gptq", "fp8-e4m3": "fp8-static"}  # base -> the recipe that tells
AT_INT8 = ("lm_head", "embedding", "attention_qkv", "attention_out")  # what int4-gptq keeps at int8-g32
ACTIVATED = ("ssm_x_proj", "ssm_dt_proj", "ssm_out", "moe_latent")  # whose inputs fp8-static leaves alone


def read(folder: Path, part: str, model: str) -> dict:
    return json.loads((folder / f"{part}-{model}.json").read_text())


def kl_of(folder: Path, recipe: str, model: str) -> float:
    with np.load(folder / "even" / f"{recipe}-{model}-ck.npz") as found:
        return float(found["prefill_kl_divergence"].mean())


def factors(whole: dict[str, dict]) -> dict[str, tuple[str, float]]:
    """Every format as a multiple of its base."""
    found = {name: (base, whole[name]["kl"] / whole[base]["kl"]) for base, others in AT_ONCE.items() for name in others}
    return {base: (base, 1.0) for base in AT_ONCE} | found


def compensated(folder: Path, model: str, weights: dict, whole: dict, together: dict, inputs: dict,
                fp8_together: float) -> dict[str, float]:  # fmt: skip
    """GPTQ's part of rounding to nearest by base; int8's first, which int4-gptq has in some roles."""
    eight, four = ({role: row[base]["kl"] for role, row in weights.items()} for base in ("int8", "int4-g32"))
    found = {"int8": kl_of(folder, "int8", model) / whole["int8"]["kl"]}
    kept = sum(cost for role, cost in eight.items() if role in AT_INT8) * together["int8"] * found["int8"]
    rest = sum(cost for role, cost in four.items() if role not in AT_INT8) * together["int4-g32"]
    found["int4-g32"] = (kl_of(folder, "int4-gptq", model) - kept) / rest
    rounded = sum(row["static-fp8"]["kl"] for role, row in inputs.items() if role not in ACTIVATED) * fp8_together
    found["fp8-e4m3"] = (kl_of(folder, "fp8-static", model) - rounded) / whole["fp8-e4m3"]["kl"]
    return found


def short(number: float) -> float:
    """Two digits."""
    return float(f"{number:.2g}")


def block(folder: Path, model: str) -> str:
    weights, inputs = read(folder, "weights", model), read(folder, "inputs", model)["inputs"]
    by_role, whole = weights["weights"], weights["whole"]
    together = {base: whole[base]["kl"] / sum(row[base]["kl"] for row in by_role.values()) for base in AT_ONCE}
    at_once = read(folder, "inputs_whole", model)["inputs_whole"]
    inputs_together = {
        form: found["kl"] / sum(row[form]["kl"] for row in inputs.values()) for form, found in at_once.items()
    }
    parts = compensated(folder, model, by_role, whole, together, inputs, inputs_together["dynamic-fp8"])
    known = [f'"{name}": ("{base}", {short(factor)}),' for name, (base, factor) in factors(whole).items()]
    states = [
        f'("{kind}", {", ".join(map(repr, form.split()))}): {short(row["kl"])},'
        for kind, forms in read(folder, "states", model)["states"].items()
        for form, row in forms.items()
    ]
    lines = ["weights={", *_by_role(by_role), "},", f"together={_plain(together)},", "formats={", *known, "},"]
    lines += [f"compensated={_plain(parts)},", "inputs={", *_by_role(inputs), "},"]
    lines += [f"inputs_together={_plain(inputs_together)},", "states={", *states, "},"]
    return "\n".join(lines)


def _by_role(table: dict[str, dict]) -> list[str]:
    return [
        f'Role("{role}"): {_plain({name: max(found["kl"], 0.0) for name, found in row.items()})},'
        for role, row in table.items()
    ]


def _plain(numbers: dict[str, float]) -> dict[str, float]:
    return {name: short(number) for name, number in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for model in ("tiny-jamba", "tiny-nemotron-h"):
        print(f"# {model}\n{block(folder, model)}")


if __name__ == "__main__":
    main()
