"""What a model card says to paste: how each runtime of a report takes an artifact."""

PYTHON = {
    # `folder` is the checkpoint's
    "transformers": """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)""",
    "compress.load": """import compress

model = compress.load(folder)""",
    # `output` is the folder that all artifacts lie in
    "onnxruntime": """import onnxruntime

session = onnxruntime.InferenceSession(f"{{output}}/{path}")""",
    "tensorrt-rtx": """import onnxruntime
import onnxruntime_ep_nv_tensorrt_rtx as rtx

onnxruntime.register_execution_provider_library(rtx.get_ep_name(), rtx.get_library_path())
gpus = [device for device in onnxruntime.get_ep_devices() if device.ep_name == rtx.get_ep_name()]
options = onnxruntime.SessionOptions()
options.add_provider_for_devices(gpus, {{}})
session = onnxruntime.InferenceSession(f"{{output}}/{path}", options)""",
    "onnxruntime-genai": """import onnxruntime_genai

model = onnxruntime_genai.Model(f"{{output}}/{folder}")""",
    "openvino": """import openvino

settings = {{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}
model = openvino.Core().compile_model(f"{{output}}/{path}", "CPU", settings)""",
}
JAVASCRIPT = {
    "transformers.js": """import {{ AutoModelForCausalLM }} from "@huggingface/transformers";

const model = await AutoModelForCausalLM.from_pretrained(`${{output}}/{folder}`);""",
}


def of(runtime: str, path: str) -> tuple[str, str]:
    """The language and the text for an artifact at `path` of an output, such as `onnx/model.onnx`."""
    language, snippets = ("python", PYTHON) if runtime in PYTHON else ("js", JAVASCRIPT)
    return language, snippets[runtime].format(path=path, folder=path.partition("/")[0])
