"""Plants single faults in a finished checkpoint, as a bug would, and asks whether the gate finds them.

    python benchmarks/planted_faults.py ORIGINAL OUTPUT [--only NAME]

OUTPUT is an output folder of `apply` with a checkpoint and an ONNX export. Each fault is planted in a copy without its manifest, in
the stored formats: a quantized matrix is read, changed, and rounded to nearest in its format again. Prints a line for each: the
verdict of `compress check --limits default`, and what it names first.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import load, save_file

from compress import formats
from compress.check import auditing
from compress.checkpoint.reader import Checkpoint
from compress.formats import hadamard
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.weight import PLAIN_DTYPES, Weight
from compress.runtime.artifacts import find_artifact, open_artifact

OPTIONS = ("--no-audit", "--limits", "default", "--samples", "12")  # of text: what is left open shows in so little
Fault = Callable[["Planter"], None]


class Planter:
    """A copy of a checkpoint whose tensors can be changed. Names are looked for by role and by how they end."""

    def __init__(self, checkpoint: Path, folder: Path):
        shutil.copytree(checkpoint, folder, symlinks=False)
        self.folder, self._generator = folder, torch.Generator().manual_seed(1)
        self.touched: set[str] = set()

    @property
    def model(self) -> HybridModel:
        """As it is now: what is saved moves other tensors within a file."""
        return Checkpoint(self.folder, allow_quantized=True).model

    def find(self, role: Role, end: str = "weight", layer: int | None = None) -> Weight:
        """The first that ends so, of a layer or of any; LookupError where there is none."""
        start = "" if layer is None else f"layers.{layer}."
        for weight in self.model.weights:
            if weight.role == role and weight.name.endswith(end) and start in weight.name:
                return weight
        raise LookupError(f"{role} {end}")

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._generator)

    def put(self, weight: Weight, dense: torch.Tensor) -> None:
        """Stores float32 values in the format that the weight has."""
        self.touched.add(weight.name)
        if weight.is_quantized:
            dense = dense if weight.rotation is None else hadamard.rotate(dense, weight.rotation)
            parts = weight.stored_parts(formats.get(weight.format).quantize(dense.clone()))
        else:
            parts = {weight.name: dense.to(PLAIN_DTYPES[weight.format])}
        for path in self.folder.glob("*.safetensors"):
            tensors = load(path.read_bytes())  # a mapped file must not be written over
            if here := {name: tensor.contiguous() for name, tensor in parts.items() if name in tensors}:
                save_file(tensors | here, path, metadata={"format": "pt"})

    def change(self, weight: Weight, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.put(weight, function(weight.dense().clone()))


def int4_per_tensor(dense: torch.Tensor) -> torch.Tensor:
    step = dense.abs().max() / 7
    return (dense / step).round().clamp(-8, 7) * step


def zeroed(dense: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(dense)


def with_rows(rows: dict[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(dense: torch.Tensor) -> torch.Tensor:
        other = dense.clone()
        for to, source in rows.items():
            other[to] = dense[source]
        return other

    return change


def expert_zeroed(planter: Planter) -> None:
    stem = _first_moe(planter.model) + ".experts.3."
    for name in [weight.name for weight in planter.model.weights if weight.name.startswith(stem)]:
        planter.change(planter.find(Role.EXPERTS, name), zeroed)


def _first_moe(model: HybridModel) -> str:
    names = [weight.name for weight in model.weights if weight.role == Role.EXPERTS and ".experts." in weight.name]
    return names[0].partition(".experts.")[0]


def swapped(planter: Planter, first: Weight, second: Weight) -> None:
    values = first.dense().clone(), second.dense().clone()
    planter.put(first, values[1])
    planter.put(second, values[0])


def experts_swapped(planter: Planter) -> None:
    stem = _first_moe(planter.model)
    for end in ("up_proj.weight", "down_proj.weight"):
        swapped(planter, *(planter.find(Role.EXPERTS, f"{stem}.experts.{e}.{end}") for e in (1, 2)))


def gate_and_up_swapped(planter: Planter) -> None:
    swapped(planter, planter.find(Role.MLP, "gate_proj.weight"), planter.find(Role.MLP, "up_proj.weight"))


def expert_gate_and_up_swapped(planter: Planter) -> None:
    stem = _first_moe(planter.model) + ".experts.2."
    swapped(planter, *(planter.find(Role.EXPERTS, f"{stem}{part}_proj.weight") for part in ("gate", "up")))


def embedding_corrupted(planter: Planter) -> None:
    def change(dense: torch.Tensor) -> torch.Tensor:
        dense[100:120] = planter.noise(dense[100:120]) * dense.std()
        return dense

    planter.change(planter.model.embedding, change)


def column_zeroed(dense: torch.Tensor) -> torch.Tensor:
    dense[:, 5] = 0
    return dense


def on(role: Role, end: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return lambda planter: planter.change(planter.find(role, end), function)


def noisy(share: float, role: Role, end: str = "weight") -> Fault:
    def plant(planter: Planter) -> None:
        planter.change(planter.find(role, end), lambda w: w + share * w.std() * planter.noise(w))

    return plant


def first_tap_zeroed(dense: torch.Tensor) -> torch.Tensor:
    dense[..., 0] = 0
    return dense


FAULTS: dict[str, Fault] = {
    "expert zeroed": expert_zeroed,
    "expert down_proj zeroed": on(Role.EXPERTS, "3.down_proj.weight", zeroed),
    "dt_proj int4 per tensor": on(Role.SSM_DT_PROJ, "weight", int4_per_tensor),
    "dense down_proj int4 per tensor": on(Role.MLP, "down_proj.weight", int4_per_tensor),
    "expert down_proj int4 per tensor": on(Role.EXPERTS, "1.down_proj.weight", int4_per_tensor),
    "expert up_proj int4 per tensor": on(Role.EXPERTS, "1.up_proj.weight", int4_per_tensor),
    "ssm in_proj int4 per tensor": on(Role.SSM_IN, "weight", int4_per_tensor),
    "ssm out_proj int4 per tensor": on(Role.SSM_OUT, "weight", int4_per_tensor),
    "o_proj int4 per tensor": on(Role.ATTENTION_OUT, "weight", int4_per_tensor),
    "router rows swapped": on(Role.ROUTER, "weight", with_rows({1: 4, 4: 1})),
    "router noise 10 %": noisy(0.1, Role.ROUTER),
    "router noise 1 %": noisy(0.01, Role.ROUTER),
    "first conv tap zeroed": on(Role.SSM_CONV, "weight", first_tap_zeroed),
    "conv taps reversed": on(Role.SSM_CONV, "weight", lambda w: w.flip(-1)),
    "keys times 2": on(Role.ATTENTION_QKV, "k_proj.weight", lambda w: 2 * w),
    "queries times 1.1": on(Role.ATTENTION_QKV, "q_proj.weight", lambda w: 1.1 * w),
    "values negated": on(Role.ATTENTION_QKV, "v_proj.weight", lambda w: -w),
    "A_log + 0.3": on(Role.SSM_A, "A_log", lambda w: w + 0.3),
    "A_log + 0.01": on(Role.SSM_A, "A_log", lambda w: w + 0.01),
    "D zeroed": on(Role.SSM_D, "D", zeroed),
    "dt bias zeroed": lambda p: p.change(next(w for w in p.model.weights if w.role == Role.SSM_DT_BIAS), zeroed),
    "embedding of 20 tokens": embedding_corrupted,
    "embedding row swap": lambda p: p.change(p.model.embedding, with_rows({200: 300, 300: 200})),
    "gate and up swapped": gate_and_up_swapped,
    "expert's gate and up swapped": expert_gate_and_up_swapped,
    "experts swapped": experts_swapped,
    "norm times 1.1": on(Role.NORM, "weight", lambda w: 1.1 * w),
    "final norm times 1.01": lambda p: p.change(p.model.final_norm, lambda w: 1.01 * w),
    "lm_head rows swapped": lambda p: p.change(p.model.output_matrix, with_rows({500: 600, 600: 500})),
    "lm_head times 1.05": lambda p: p.change(p.model.output_matrix, lambda w: 1.05 * w),
    "expert input zeroed": on(Role.EXPERTS, "1.up_proj.weight", column_zeroed),
    "ssm out_proj input zeroed": on(Role.SSM_OUT, "weight", column_zeroed),
    "expert noise 5 %": noisy(0.05, Role.EXPERTS, "2.down_proj.weight"),
    "expert noise 30 %": noisy(0.3, Role.EXPERTS, "2.down_proj.weight"),
    "ssm in_proj noise 5 %": noisy(0.05, Role.SSM_IN),
    "expert times 1.1": on(Role.EXPERTS, "2.up_proj.weight", lambda w: 1.1 * w),
    "expert times 0.95": on(Role.EXPERTS, "2.down_proj.weight", lambda w: 0.95 * w),
    "x_proj rows swapped": on(Role.SSM_X_PROJ, "weight", lambda w: w.roll(1, 0)),
}


# In an exported graph: what a state becomes between calls. Prefill is as it was.


def _between_calls(graph: onnx.ModelProto, state: str, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    """The first output of that name is what `make` makes of it; LookupError where there is none."""
    names = [output.name for output in graph.graph.output if output.name.endswith(f".{state}")]
    if not names:
        raise LookupError(state)
    inner = names[0] + ".whole"
    for node in graph.graph.node:
        node.output[:] = [inner if name == names[0] else name for name in node.output]
    graph.graph.node.extend(make(inner, names[0]))


def times(graph: onnx.ModelProto, state: str, factor: float) -> None:
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "planted"))
    _between_calls(graph, state, lambda given, name: [onnx.helper.make_node("Mul", [given, "planted"], [name])])


def to_fp8(graph: onnx.ModelProto) -> None:
    def make(given: str, name: str) -> list[onnx.NodeProto]:
        narrow = given + ".fp8"
        return [
            onnx.helper.make_node("Cast", [given], [narrow], to=onnx.TensorProto.FLOAT8E4M3FN),
            onnx.helper.make_node("Cast", [narrow], [name], to=onnx.TensorProto.FLOAT),
        ]

    _between_calls(graph, "recurrent_state", make)


GRAPH_FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "conv state dropped": lambda graph: times(graph, "conv_state", 0.0),
    "state rounded to fp8 nearest": to_fp8,
    "recurrent state times 0.99": lambda graph: times(graph, "recurrent_state", 0.99),
    "keys in the cache times 2": lambda graph: times(graph, "key", 2.0),
    "values in the cache dropped": lambda graph: times(graph, "value", 0.0),
}


def plant_in_graph(folder: Path, copy: Path, fault: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an exported folder with the fault."""
    shutil.copytree(folder, copy)
    graph = onnx.load(copy / "model.onnx", load_external_data=False)
    fault(graph)
    onnx.save(graph, copy / "model.onnx")
    return copy


def gate(original: Path, candidate: Path) -> tuple[str, list[str]]:
    """The verdict of the gate by default, and what it names: audits that failed, metrics that were missed. Figures are measured
    only where the audit, which runs first and decides, finds nothing."""
    before, after = (open_artifact(find_artifact(path)) for path in (original, candidate))
    audited = auditing.audited("candidate", before, after, seed=0, device="cpu")
    named = [f"{row['tensor']} {row['note']}" for row in audited.audit if not row["passed"]]
    named += [
        f"layer {r['layer']} {r['block']}: {r['matrix'] or 'output'}" for r in audited.layer_audit if not r["passed"]
    ]
    if named:
        return "fail", named
    found = _checked(original, candidate)
    missed = (row for row in found["checks"] if row["outcome"] == "missed")
    return found["verdict"], [f"{row['metric']} ({row['phase']}) {_figure(row['value'])}" for row in missed]


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _checked(original: Path, candidate: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "compress", "check", str(original), str(candidate), "--json", str(target)]
        told = subprocess.run([*command, *OPTIONS], check=False, capture_output=True, text=True)
        if not target.is_file():
            raise SystemExit(told.stderr)
        return json.loads(target.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    arguments = parser.parse_args()
    print("| fault | verdict | named first |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in [name for name in (*FAULTS, *GRAPH_FAULTS) if arguments.only in name]:
            try:
                planted = _planted(name, arguments.output, Path(scratch) / name.replace(" ", "-"))
            except LookupError:
                continue  # the model has no such tensor or state
            verdict, named = gate(arguments.original, planted)
            print(f"| {name} | {verdict} | {named[0] if named else ''} |", flush=True)
            shutil.rmtree(planted)


def _planted(name: str, output: Path, folder: Path) -> Path:
    if name in GRAPH_FAULTS:
        return plant_in_graph(output / "onnx", folder, GRAPH_FAULTS[name])
    planter = Planter(output / "checkpoint", folder)
    FAULTS[name](planter)
    return folder


if __name__ == "__main__":
    main()
