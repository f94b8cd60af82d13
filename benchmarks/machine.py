"""What a figure was measured on: processor, instruction set, cores, memory, date and versions."""

import datetime
import os
from importlib.metadata import version
from pathlib import Path

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def describe_machine() -> dict:
    """Facts for RESULTS.md."""
    info = Path("/proc/cpuinfo").read_text()
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    memory = int(
        next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    )
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown"
        ),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "numpy")},
    }
