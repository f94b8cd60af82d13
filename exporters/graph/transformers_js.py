"""The layout that Transformers.js looks for: config.json beside the tokenizer, the graph in onnx/, its names for states.

It takes its models from a fixed list, and Jamba is not on it. What a decoder must be fed it reads off `model_type`: those
with Mamba and attention layers side by side are told apart by `layer_types`, and the shapes of their states by the graph. So
the configuration poses as the first of these (Granite 4's) for every family, with the model's own values where all families
mean the same by them; the graph's metadata carry the true one.
"""

import onnx_ir as ir

from compress.checkpoint.reader import Checkpoint
from compress.model.block import Layer
from compress.model.states import StateKind
from compress.runtime.graph_names import in_transformers_js
from compress.strict.json_text import JsonObject
from exporters.graph.heads import heads_of

# Transformers' tokenizers read this file too, as a configuration of the type it poses as, and check it: so one Mamba head,
# which divides any width, and no key that another family means otherwise
POSE: JsonObject = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "mamba_n_heads": 1,
}
OWN = ("vocab_size", "hidden_size", "max_position_embeddings", "tie_word_embeddings")
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # as config.json has them: one that is missing stays so
STATELESS = "moe"  # of the words transformers knows the one for a layer without states
# the plain file, whose data lie in a file of their own (its default in browsers would be model_quantized.onnx)
SETTINGS: JsonObject = {"dtype": "fp32", "use_external_data_format": True}


def rename_states(graph: ir.Graph) -> None:
    for value in (*graph.inputs, *graph.outputs):
        value.name = in_transformers_js(value.name or "")


def config(checkpoint: Checkpoint) -> JsonObject:
    """config.json for Transformers.js."""
    model = checkpoint.model
    own: JsonObject = {key: getattr(model.config, key) for key in OWN}
    ends: JsonObject = {key: checkpoint.config[key] for key in ENDS if key in checkpoint.config}
    heads = heads_of(model.architecture)
    sizes: JsonObject = {
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.key_values,
        "head_dim": heads.size,
        "num_hidden_layers": len(model.layers),
    }
    kinds = [_layer_type(layer) for layer in model.layers]
    return {**POSE, **own, **ends, **sizes, "layer_types": kinds, "transformers.js_config": SETTINGS}


def _layer_type(layer: Layer) -> str:
    """By what it carries, which is what the library makes a cache for."""
    kinds = {spec.kind for spec in layer.states}
    if StateKind.KV in kinds:
        return "attention"
    return "mamba" if kinds else STATELESS
