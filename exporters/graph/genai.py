"""genai_config.json: how onnxruntime-genai runs the graph. `decoder` is the type that takes hybrid states by name."""

from compress.checkpoint.end_tokens import end_tokens
from compress.checkpoint.reader import Checkpoint
from compress.model.architecture import Architecture
from compress.model.config import Config
from compress.model.states import StateKind
from compress.output_folder.onnx_layouts import GENAI
from compress.recipe.source import tokenizer_of
from compress.strict.json_text import JsonObject
from exporters.graph.heads import Heads, heads_of


def config(checkpoint: Checkpoint) -> JsonObject:
    """The configuration for a decoder with the contract's input and output names, which stops at every end of text."""
    model, folder = checkpoint.model, checkpoint.folder
    ends = end_tokens(model.config, folder, tokenizer_of(folder))
    ours, heads = model.config, heads_of(model.architecture)
    return {
        "model": {
            "type": "decoder",
            **_special_tokens(model.config, ends),
            "context_length": ours.max_position_embeddings,
            "vocab_size": ours.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GENAI.model,
                "hidden_size": ours.hidden_size,
                "head_size": _key_size(model.architecture, heads),
                "num_attention_heads": heads.queries,
                "num_key_value_heads": heads.key_values,
                "num_hidden_layers": ours.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": ours.max_position_embeddings, "do_sample": False, "past_present_share_buffer": False},
    }


def _key_size(architecture: Architecture, heads: Heads) -> int:
    """Of a key as it is kept: what the cache is made by."""
    specs = (spec for layer in architecture.layers for spec in layer.states)
    return next((spec.stored_shape[-1] for spec in specs if spec.kind == StateKind.KV), heads.size)


def _special_tokens(config: Config, ends: list[int]) -> dict[str, int | list[int]]:
    """The ids that are set to a token; genai refuses null, and some models write -1 for none or name one they do not have."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id")}
    found = {name: value for name, value in ids.items() if value is not None and 0 <= value < config.vocab_size}
    return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
