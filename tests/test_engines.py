"""What is known of engines without building one: sizes they are for, what their files hold, what was widened, what builders say."""

import itertools
import json
import struct
from types import SimpleNamespace

import builders
import fake_tensorrt
import numpy as np
import onnx_ir as ir
import pytest
import torch

from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from exporters.engines import build, callbacks, child, library, messages, profiles, sections, verify
from exporters.engines.verify import Seen
from exporters.graph import artifact

INPUTS = {
    "input_ids": ["batch_size", "sequence_length"],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "past_key_values.0.conv_state": ["batch_size", 320, 3],
    "past_key_values.4.key": ["batch_size", 1, "past_sequence_length", 64],
}
SIZES = [(1, 512, 4096), (1, 1, 1), (4, 128, 128), (8, 16, 100_000), (1, 64, 65), (2, 1, 2)]


@pytest.mark.parametrize(("batch", "prefill", "context"), SIZES)
def test_profiles_take_whatever_the_options_promise(batch, prefill, context):
    """Prompts at once, prompts in pieces, and tokens one by one up to the end of the context, of one sequence or of all."""
    prompts, tokens = profiles.of(INPUTS, batch=batch, prefill_length=prefill, context=context)
    asked = itertools.product((1, batch), [(prompts, prefill, 0), (prompts, 1, 0), (prompts, prefill, context - prefill),
                                           (tokens, 1, 0), (tokens, 1, context - 1), (tokens, 1, context // 2)])  # fmt: skip
    for sequences, (profile, new, past) in asked:
        shapes = {
            "input_ids": [sequences, new],
            "attention_mask": [sequences, past + new],
            "past_key_values.0.conv_state": [sequences, 320, 3],
            "past_key_values.4.key": [sequences, 1, max(past, 0), 64],
        }
        for name, shape in shapes.items():
            low, high = (profile["inputs"][name][which] for which in ("min", "max"))
            fits = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            assert fits, (profile["name"], name, shape, low, high)


@pytest.mark.parametrize(("batch", "prefill", "context"), SIZES)
def test_profiles_are_in_order_and_agree_on_tokens(batch, prefill, context):
    """TensorRT refuses shapes whose masks are not as long as past and new tokens together, and one out of order."""
    for profile in profiles.of(INPUTS, batch=batch, prefill_length=prefill, context=context):
        inputs = profile["inputs"]
        for which in ("min", "opt", "max"):
            past, new = inputs["past_key_values.4.key"][which][2], inputs["input_ids"][which][1]
            assert inputs["attention_mask"][which][1] == past + new
        for shapes in inputs.values():
            assert all(a <= b <= c for a, b, c in zip(shapes["min"], shapes["opt"], shapes["max"], strict=True))


def test_each_profile_is_tuned_to_what_it_is_for():
    prompts, tokens = profiles.of(INPUTS, batch=4, prefill_length=128, context=1024)
    assert (prompts["name"], tokens["name"]) == ("prefill", "decode")
    assert prompts["inputs"]["input_ids"]["opt"] == [4, 128]
    assert tokens["inputs"]["input_ids"]["opt"] == [4, 1]


def test_no_profile_is_of_single_tokens_only():
    """For which TensorRT-RTX keeps all weights a second time."""
    for profile in profiles.of(INPUTS, batch=1, prefill_length=1, context=1):
        assert profile["inputs"]["input_ids"]["max"][1] > 1


def engine(path, *sections_of, magic=b"trtv"):
    """A file with a table of sections and so many bytes of each."""
    table, content = b"", b""
    begin = 16 + 24 * len(sections_of)
    for name, size in sections_of:
        table += struct.pack("<4s4xQQ", name, begin + len(content), size)
        content += bytes(size)
    path.write_bytes(magic.ljust(16, b"\0") + table + content)
    return path


def test_the_weights_of_an_engine_file_are_counted(tmp_path):
    assert sections.weight_bytes(engine(tmp_path / "e", (b"NGNE", 5000), (b"THGW", 1234), (b"ptrt", 9))) == 1234


@pytest.mark.parametrize(
    "content", [b"", b"THGW", b"ftrt" + bytes(5000), b"THGW" + b"\xff" * 20, bytes(9000) + b"THGW" + bytes(20)]
)
def test_a_file_of_another_kind_does_not_tell(tmp_path, content):
    path = tmp_path / "e"
    path.write_bytes(content)
    assert sections.weight_bytes(path) is None


def stored(folder, array, dtype=None, shape=None):
    (folder / "data").write_bytes(b"before" + array.tobytes())
    return ir.ExternalTensor(
        "data",
        6,
        array.nbytes,
        dtype or ir.DataType.INT8,
        shape=ir.Shape(shape or array.shape),
        name="w",
        base_dir=folder,
    )


def test_a_tensor_lies_in_an_engine_beside_another(tmp_path):
    """As builders put matrices of one input next to each other."""
    random = np.random.default_rng(0)
    one, two = (random.integers(-127, 128, (8, 40), np.int8) for _ in range(2))
    (tmp_path / "e").write_bytes(b"other" + np.concatenate([two, one], 1).tobytes())
    assert sections.holds_row(tmp_path / "e", stored(tmp_path, one))
    (tmp_path / "e").write_bytes(b"other" + (one * np.float16(0.01)).tobytes())
    assert not sections.holds_row(tmp_path / "e", stored(tmp_path, one))


def test_rows_of_four_bits_are_half_as_long(tmp_path):
    packed = np.random.default_rng(0).integers(0, 256, 8 * 5, np.uint8)
    tensor = stored(tmp_path, packed, ir.DataType.INT4, (8, 10))
    (tmp_path / "e").write_bytes(packed[:5].tobytes() + bytes(9))
    assert sections.holds_row(tmp_path / "e", tensor)


FORMATS = {"a": "int8", "b": "int4-g32", "c": "fp8-e4m3-tensor", "d": "bf16", "e": "int8-g32"}
CONSTANTS = {"a": "int8", "b": "int4", "c": "fp8", "d": "bf16", "e": "int8"}


def verified(constants=CONSTANTS, inspected=None, weight_bytes=10_000_000, as_stored=lambda name: True, names=None):
    return verify.verify(FORMATS, names or {}, 10_000_000, Seen(constants, inspected, weight_bytes, as_stored))


def test_what_is_quantized_in_the_network_and_as_small_as_it_should_be_is_verified():
    found = verified()
    assert found.widened == []
    assert [(row["tensor"], row["precision"], row["source"]) for row in found.layers] == [
        ("a", "int8", "network"), ("b", "int4", "network"), ("c", "fp8", "network"), ("e", "int8", "network"),
    ]  # fmt: skip


@pytest.mark.parametrize("held", ["bf16", "half", "float", "fp8", "int8, never dequantized", None])
def test_a_layer_that_is_something_else_in_the_network_is_named(held):
    constants = {name: kind for name, kind in {**CONSTANTS, "e": held}.items() if kind}
    assert verified(constants).widened == ["e"]


def test_a_member_of_a_stack_is_what_the_stack_is():
    constants = {**{k: v for k, v in CONSTANTS.items() if k not in "ae"}, "stack": "int8"}
    assert verified(constants, names={"a": "stack", "e": "stack"}).widened == []
    assert verified({**constants, "stack": "bf16"}, names={"a": "stack", "e": "stack"}).widened == ["a", "e"]


@pytest.mark.parametrize(
    ("weight_bytes", "is_widened"), [(12_000_000, False), (12_000_001, True), (9_000_000, False), (None, False)]
)
def test_an_engine_of_more_than_a_tenth_and_a_megabyte_above_the_arithmetic_is_widened(weight_bytes, is_widened):
    assert bool(verified(weight_bytes=weight_bytes).widened) == is_widened


def test_of_an_engine_that_is_too_large_the_tensors_that_do_not_lie_in_it_are_named():
    assert verified(weight_bytes=20_000_000, as_stored=lambda name: name != "c").widened == ["c"]
    assert verified(weight_bytes=20_000_000).widened == ["a", "b", "c", "e"]


def test_an_engine_whose_weights_are_plain_has_nothing_to_widen():
    assert verify.verify({"d": "bf16"}, {}, 10, Seen({}, None, 10**9, lambda name: False)).widened == []


def test_the_inspector_has_the_first_word():
    layers = [
        {
            "Name": "l",
            "Inputs": [{"Name": "a", "Format/Datatype": "Row major Int8"}, {"Name": "x", "Format/Datatype": "Half"}],
        },
        {"Name": "m", "Inputs": [{"Name": "b_output", "Format/Datatype": "Half"}]},
        "a name alone",
    ]
    found = verified(inspected=json.dumps({"Layers": layers}))
    assert found.widened == ["b"]
    assert {row["tensor"]: row["source"] for row in found.layers} == {
        "a": "inspector",
        "b": "inspector",
        "c": "network",
        "e": "network",
    }


@pytest.mark.parametrize(("width", "bytes_of_plain", "bytes_of_scales"), [(2, 2, 2), (4, 4, 4)])
def test_the_arithmetic_of_an_engine_has_numbers_as_wide_as_hidden_states(width, bytes_of_plain, bytes_of_scales):
    """In a layer that is kept in fp32, weights in bf16 take four bytes."""

    def weight(name, number_format):
        return Weight(name, Role.MLP, (8, 64), number_format, lambda rows: torch.empty(0))

    unit = Unit("layer.0", {w.name: w for w in (weight("a", "bf16"), weight("b", "int8"), weight("c", "int4-g32"))})
    plain, int8, int4 = 512 * bytes_of_plain, 512 + 8 * bytes_of_scales, 256 + 16 * bytes_of_scales
    assert artifact.engine_bytes(unit, width) == plain + int8 + int4


def graph_of_layers():
    """Two layers of a norm (operators without weights first) and a product, and a head."""
    x = ir.Value(name="x")
    nodes, value = [], x

    def add(kind, name, weight=None):
        nonlocal value
        inputs = [value]
        if weight:
            tensor = ir.ExternalTensor("data", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name=weight)
            inputs.append(ir.Value(name=weight, const_value=tensor))
        nodes.append(ir.node(kind, inputs, name=name))
        value = nodes[-1].outputs[0]

    for layer in range(2):
        add("ReduceMean", f"ReduceMean_{layer}")
        add("Mul", f"Mul_{layer}", f"model.layers.{layer}.input_layernorm.weight")
        add("TopK", f"TopK_{layer}")
        add("MatMul", f"MatMul_{layer}", f"model.layers.{layer}.mlp.weight")
        add("Add", f"Add_{layer}")
        add("Add", f"Add_{layer}b")
    add("Mul", "Mul_9", "model.final_layernorm.weight")
    inner = ir.node("NonZero", [value], name="NonZero_7")
    body = ir.Graph([], [], nodes=[inner], name="body")
    nodes.insert(3, ir.node("Scan", [nodes[2].outputs[0]], {"body": body}, name="Scan_5"))
    return ir.Graph([x], [value], nodes=nodes)


@pytest.mark.parametrize(
    ("node", "place"),
    [("ReduceMean_0", "layer 0"), ("TopK_0", "layer 0"), ("NonZero_7", "layer 0"), ("Add_0", "layer 0"), ("ReduceMean_1", "layer 1"),
     ("TopK_1", "layer 1"), ("Mul_9", "at 'model.final_layernorm.weight'"), ("nowhere", "in the graph"), ("", "in the graph")],
)  # fmt: skip
def test_an_operator_is_told_by_its_layer(node, place):
    assert messages.place(graph_of_layers(), node) == place


def test_what_a_parser_refuses_is_one_sentence_about_an_operator_of_a_layer():
    missing = "Assertion failed: creator && NonZero plugin creator version 1 was not found in plugin registry."
    errors = [{"description": missing, "node": "NonZero_7", "operator": "NonZero"}] * 3
    assert (
        messages.refusal(errors, graph_of_layers())
        == "layer 0: NonZero 'NonZero_7': it has no such operator (and 2 more)"
    )
    other = {
        "description": "ModelImporter.cpp:77 In function importTopK:\n[6] k must be constant",
        "node": "TopK_1",
        "operator": "TopK",
    }
    assert messages.refusal([other], graph_of_layers()) == "layer 1: TopK 'TopK_1': [6] k must be constant"
    assert messages.refusal([], graph_of_layers())


def test_a_builders_error_is_told_with_the_layer_of_the_operator_it_names():
    said = "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (IShuffleLayer TopK_1: bad In executeReshape at /_src/x.cpp:348)"
    assert messages.failure(said, graph_of_layers()) == "layer 1: Internal Error (IShuffleLayer TopK_1: bad"
    assert messages.failure("no memory for Thing_12", graph_of_layers()) == "no memory for Thing_12"


REFUSED = (  # by TensorRT-RTX 1.7.1 on an H100
    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU, which has compute capability "
    "9.0. Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0. In throwUnlessComputeCapSupported at /_src/runtime.cpp:84)"
)


def on_a_gpu(monkeypatch, engine: object, *errors: str) -> dict:
    """What a build says of an engine that a GPU opens as `engine`, if it does, with errors."""

    class Runtime(fake_tensorrt.Runtime):
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            for error in errors:
                self.logger.log(fake_tensorrt.named("ERROR"), error)
            return engine

    monkeypatch.setattr(child, "NO_GPU", False)
    monkeypatch.setattr(fake_tensorrt, "Runtime", Runtime)
    job = {"model": "", "engine": __file__, "timings": "", "profiles": []}
    made = child._Build(library.Builder("TensorRT", "99.1", fake_tensorrt), job, channel=None)
    made._log.log(fake_tensorrt.named("ERROR"), "an error of the build")
    return dict(zip(("inspected", "unopened"), made._inspected(), strict=True))


def test_a_gpu_that_does_not_open_an_engine_is_told_with_the_reason(monkeypatch):
    built = on_a_gpu(monkeypatch, None, REFUSED)
    assert build.why_not_executed(built) == (
        "the GPU here does not open it: The engine cannot run on this GPU, which has compute capability 9.0. Supported compute "
        "capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0."
    )
    assert "no reason" in build.why_not_executed(on_a_gpu(monkeypatch, None))


def test_an_engine_that_a_gpu_opens_is_inspected_and_not_said_to_have_had_no_gpu(monkeypatch):
    inspector = SimpleNamespace(get_engine_information=lambda form: '{"Layers": []}')
    built = on_a_gpu(monkeypatch, SimpleNamespace(create_engine_inspector=lambda: inspector))
    assert built["inspected"] == '{"Layers": []}'
    assert build.why_not_executed(built) == build.ONLY_OPENED
    assert build.why_not_executed({"inspected": None, "unopened": None}) == build.NO_GPU_RAN_IT


def test_progress_of_phases_within_phases_is_one_share_that_only_grows():
    told = []
    progress = callbacks.Progress(told.append)
    progress.start("all", None, 2)
    progress.step("all", 0)
    progress.start("within", "all", 10)
    for step in range(10):
        assert progress.step("within", step)
        progress.step("unknown", step)
    progress.start("within", "all", 4)  # as builders begin phases of one name again
    progress.step("within", 0)
    progress.step("all", 1)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.5, 1.0)
    assert 0.74 < told[5] < 0.86


@pytest.fixture
def packages(monkeypatch):
    """Which of the three packages that matter are there."""

    def there(*names):
        monkeypatch.setattr(library, "_is_installed", lambda package: package in names)

    return there


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no builder is installed"),
        (("tensorrt_rtx_bindings",), "tensorrt_rtx_bindings is installed without onnxruntime_ep_nv_tensorrt_rtx"),
        (("onnxruntime_ep_nv_tensorrt_rtx",), "onnxruntime_ep_nv_tensorrt_rtx is installed without tensorrt_rtx_bindings"),
    ],
)  # fmt: skip
def test_half_a_builder_is_told_by_name_and_how_to_complete_it(packages, names, said):
    packages(*names)
    why = builders.FOUND()
    assert said in why and "pip install 'compress-hybrid-llm[tensorrt-rtx]'" in why


def test_a_whole_builder_is_found(packages):
    for names in (("tensorrt",), ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx")):
        packages(*names)
        assert builders.FOUND() is None


def test_a_folder_without_a_package_is_no_builder(tmp_path, monkeypatch):
    """Such as `tensorrt/`, where an export was written into the working folder."""
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not library._is_installed("tensorrt")


@pytest.mark.parametrize(
    ("binding", "fits"), [("1.7.1.116", True), ("1.7.1", True), ("1.8.0.3", False), ("1.7.10.1", False)]
)
def test_a_binding_of_another_version_than_its_libraries_is_refused(tmp_path, binding, fits):
    libraries = tmp_path / "libtensorrt_rtx.so.1.7.1"
    if fits:
        library.refuse_mismatch(binding, libraries)
    else:
        with pytest.raises(library.UnusableError, match=f"is version {binding}, but the libraries of .* are 1.7.1"):
            library.refuse_mismatch(binding, libraries)


def test_libraries_are_found_by_name_whatever_their_version_and_told_where_one_is_missing(tmp_path):
    for name in ("libtensorrt_onnxparser_rtx.so.1.7.1", "libcudart.so.13.4.36", "libtensorrt_shim.so", "README.txt"):
        (tmp_path / name).touch()
    with pytest.raises(library.UnusableError, match=r"has no libtensorrt_rtx\.so"):
        library.bundled(tmp_path)
    (tmp_path / "libtensorrt_rtx.so.1.7.1").touch()
    found = [path.name for path in library.bundled(tmp_path).values()]
    assert found == ["libcudart.so.13.4.36", "libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"]
