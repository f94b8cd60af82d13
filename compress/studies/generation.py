"""`compress run`: streams text from an artifact, prefill once and then one token a step with the states held."""

from collections.abc import Iterator
from pathlib import Path

import torch

from compress.checkpoint.end_tokens import end_tokens
from compress.disk.paths import as_text
from compress.errors import InputError
from compress.output_folder import integrity, onnx_layouts
from compress.prompts.text import refuse_surrogates
from compress.prompts.windows import encode, refuse_foreign_tokens, too_long
from compress.recipe.source import load_tokenizer
from compress.recipe.tokenizer import Tokenizer
from compress.runtime.artifacts import Artifact, find_artifact, open_artifact
from compress.runtime.inference import sample
from compress.terminal import progress

PREFILL_TOKENS = 4096
FEW = 0.01  # of the parameters: norms and the like, which every artifact keeps in another type


def stream_text(name: Path, prompt: str, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """Yields the generated text piece by piece, without the prompt; ends at an end-of-text token."""
    path = find_artifact(name)
    integrity.verify(path)
    artifact = open_artifact(path)
    tokenizer = load_tokenizer(artifact.folder)
    ends = set(end_tokens(artifact.config, artifact.folder, tokenizer))
    refuse_surrogates(prompt, "the prompt")
    ids = encode(tokenizer, prompt)
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has no BOS token to begin with")
    refuse_foreign_tokens(max(ids), artifact.config.vocab_size)
    if warning := too_long(len(ids) + max_tokens, artifact.config):
        progress.warn(f"prompt and --max-tokens: {warning}")
    tokens = stream_tokens(artifact, ids, max_tokens, temperature, seed)
    if path not in (name, onnx_layouts.find(name)):  # one of several in an output folder
        tokens = _announced(tokens, f"{as_text(str(path))} ({_what(artifact)})")
    yield from _readable(tokenizer, _until(tokens, ends))


def stream_tokens(artifact: Artifact, ids: list[int], max_tokens: int, temperature: float, seed: int) -> Iterator[int]:
    """Generated token ids of one sequence."""
    step, generator = artifact.steps(1).step, torch.Generator().manual_seed(seed)
    for block in torch.tensor([ids]).split(PREFILL_TOKENS, 1):  # a long prompt at once would take memory by its length
        logits = step(block)
    for remaining in range(max_tokens, 0, -1):
        token = int(sample(logits, temperature, generator)[0])
        yield token
        if remaining > 1:
            logits = step(torch.tensor([[token]]))


def _announced(tokens: Iterator[int], what: str) -> Iterator[int]:
    """Says what is running once it does: what cannot run is one sentence, of its refusal."""
    for place, token in enumerate(tokens):
        if place == 0:
            progress.note(what)
        yield token


def _what(artifact: Artifact) -> str:
    """`int4-g32, int8, onnxruntime`: the formats of all but a few parameters, the widest spread first, and the runtime."""
    total = sum(artifact.formats.values())
    ordered = sorted(artifact.formats, key=artifact.formats.__getitem__, reverse=True)
    return ", ".join([*(name for name in ordered if artifact.formats[name] >= FEW * total), artifact.runtime])


def _until(tokens: Iterator[int], ends: set[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def _readable(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes whole: a character made of several tokens appears with the last of them.

    A token's text depends on its neighbours (leading spaces), so each step decodes what follows the last but one text.
    """
    seen: list[int] = []
    before, shown = 0, 0  # tokens seen[before:shown] are the context, seen[shown:] are new
    for token in tokens:
        seen.append(token)
        context = tokenizer.decode(seen[before:shown], skip_special_tokens=True)
        text = tokenizer.decode(seen[before:], skip_special_tokens=True)
        if len(text) > len(context) and not text.endswith("\ufffd"):
            yield text[len(context) :]
            before, shown = shown, len(seen)
