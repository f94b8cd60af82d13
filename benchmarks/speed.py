"""Decode and prefill of the exported reference model beside transformers, in one run: `python benchmarks/speed.py ARTIFACT`.

ARTIFACT is an output folder of `compress apply tiny-int8`. The peer is transformers on the original in float32, with its
cache. Both use the same threads and tokens; runs alternate, medians are reported, and what counts is the ratio.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from transformers import JambaForCausalLM

from compress.recipe import resources
from compress.runtime.artifacts import find_artifact
from compress.runtime.onnx_session import OnnxSession

PREFILL, DECODE, REPEATS = 512, 64, 7


class OnnxPeer:
    def __init__(self, path: Path, threads: int):
        self._session = OnnxSession(path, threads=threads)

    def prefill(self, ids: np.ndarray) -> None:
        self._generation = self._session.start(1)
        self._generation.step(ids)

    def decode(self, token: np.ndarray) -> None:
        self._generation.step(token)


class TransformersPeer:
    def __init__(self, folder: Path, threads: int):
        torch.set_num_threads(threads)
        self._model = JambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> None:
        self._cache = self._model(input_ids=torch.from_numpy(ids), use_cache=True).past_key_values

    @torch.inference_mode()
    def decode(self, token: np.ndarray) -> None:
        self._model(input_ids=torch.from_numpy(token), past_key_values=self._cache, use_cache=True)


def measure(peer, ids: np.ndarray) -> tuple[float, float]:
    """Seconds of a prefill of 512 tokens and of the 64 decode steps that follow it."""
    began = time.perf_counter()
    peer.prefill(ids[:, :PREFILL])
    middle = time.perf_counter()
    for t in range(PREFILL, PREFILL + DECODE):
        peer.decode(ids[:, t : t + 1])
    return middle - began, time.perf_counter() - middle


def main(artifact: Path, threads: int) -> None:
    model = resources.folder("models") / "tiny-jamba"
    peers = {
        "onnxruntime int8": OnnxPeer(find_artifact(artifact), threads),
        "transformers float32": TransformersPeer(model, threads),
    }
    ids = np.random.default_rng(0).integers(3, 2048, (1, PREFILL + DECODE))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for _ in range(REPEATS + 1):
        for name, peer in peers.items():
            runs[name].append(measure(peer, ids))
    figures = {}
    for name, found in runs.items():
        prefill, decode = (
            statistics.median(values) for values in zip(*found[1:], strict=True)
        )  # the first is a warm-up
        figures[name] = {"prefill_512_ms": round(1000 * prefill, 1), "decode_64_ms": round(1000 * decode, 1)}
    ours, theirs = figures.values()
    ratios = {key: round(theirs[key] / ours[key], 2) for key in ours}
    print(
        json.dumps(
            {"machine": describe_machine(), "threads": threads, "figures": figures, "times_faster": ratios}, indent=2
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.artifact, arguments.threads)
