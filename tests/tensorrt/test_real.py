"""The adapter against NVIDIA's real bindings, as far as a machine without a GPU goes: signatures, parser, builds."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.tensorrt import network as network_module
from onnx_refit.engine.tensorrt.bindings import PACKAGES, Bindings, find_bindings
from onnx_refit.engine.tensorrt.build import build_plan
from onnx_refit.engine.tensorrt.execution import make_output_allocator
from onnx_refit.engine.tensorrt.network import mark_refittable, parse
from onnx_refit.engine.tensorrt.options import HardwareCompatibility, TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import Range, plan_profile
from onnx_refit.engine.tensorrt.support import check_support, parser_verdict
from onnx_refit.errors import EngineError, MissingExtraError, UnsupportedModelError
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.compile import Compilation, compile_model
from onnx_refit.plan.evaluate import evaluate

from .bidaf import random_bidaf
from .fake import Control, FakeDevice, fake_bindings

pytestmark = pytest.mark.tensorrt

BIDAF_RANGES = {"c": Range(1, 50, 400), "q": Range(1, 12, 40)}
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


@pytest.fixture(scope="module")
def bindings() -> Bindings:
    try:
        return find_bindings()
    except (MissingExtraError, EngineError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bidaf() -> Compilation:
    prepared = prepare(random_bidaf(), for_engine="tensorrt")
    assert not prepared.blockers
    return compile_model(prepared.model)


def signatures(function: Any) -> list[tuple[int, int]]:
    """(required, all) positional parameters of each overload, from the text that pybind11 generates."""
    found = []
    for arguments in re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) ->", function.__doc__ or "", re.MULTILINE):
        parts = re.split(r", (?=\w+: )", arguments)[1:]
        found.append((sum(" = " not in part for part in parts), len(parts)))
    return found


FAKED = (
    "Builder",
    "OnnxParser",
    "Runtime",
    "Refitter",
    "Weights",
    "IBuilderConfig",
    "IOptimizationProfile",
    "INetworkDefinition",
    "IExecutionContext",
    "ICudaEngine",
    "IRuntimeConfig",
    "IRuntimeCache",
)


@pytest.mark.parametrize("name", FAKED)
def test_the_fake_has_only_what_the_real_bindings_have_with_that_signature(bindings: Bindings, name: str) -> None:
    """What the adapter calls is what the fake has (the transaction tests fail otherwise): so this checks both."""
    fake, real = getattr(fake_bindings(Control()).module, name), getattr(bindings.module, name)
    for method, function in vars(fake).items():
        if (method.startswith("_") and method != "__init__") or method == "infer":
            continue
        if not inspect.isfunction(function):
            assert hasattr(real, method), f"{name} has no {method}"
            continue
        given = len(inspect.signature(function).parameters) - 1
        if method == "__init__" and name.startswith("I"):
            continue  # nobody but TensorRT makes these
        overloads = signatures(getattr(real, method))
        assert any(low <= given <= high for low, high in overloads), f"{name}.{method} takes {overloads}, not {given}"


def test_every_name_that_the_adapter_reads_from_the_module_is_there(bindings: Bindings) -> None:
    """``trt.A.B`` in the adapter's source, wherever ``trt`` is the module."""
    roots = {"trt", "self._trt", "bindings.module", "self._bindings.module", "location"}
    used = set()
    for file in Path(network_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                for root in roots:
                    if text.startswith(f"{root}."):
                        path = text.removeprefix(f"{root}.")
                        used.add(f"TensorLocation.{path}" if root == "location" else path)
    assert {"Refitter", "BuilderFlag.REFIT_INDIVIDUAL", "BuilderFlag.STRIP_PLAN", "TensorLocation.DEVICE"} <= used
    missing = [path for path in sorted(used) if not bindings.has(*path.split(".")) and not path.startswith("_")]
    assert not missing
    assert all(bindings.has("HardwareCompatibilityLevel", level.value) for level in HardwareCompatibility)


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        ("IBuilderConfig", "hardware_compatibility_level"),
        ("IBuilderConfig", "num_compute_capabilities"),
        ("IBuilderConfig", "set_compute_capability"),
        ("ITensor", "is_shape_tensor"),
        ("Runtime", "engine_host_code_allowed"),
        ("OnnxParser", "get_subgraph_nodes"),
        ("OnnxParser", "supports_model_v2"),
        ("OnnxParser", "supports_operator"),
        ("ParserError", "node_name"),
        ("ITimingCache", "serialize"),
    ],
)
def test_attributes_that_the_fake_has_no_need_of_are_there(bindings: Bindings, owner: str, attribute: str) -> None:
    assert hasattr(getattr(bindings.module, owner), attribute)


def test_every_dtype_of_the_table_is_there(bindings: Bindings) -> None:
    for dtype in ("float32", "float16", "bfloat16", "int8", "int4", "int32", "int64", "bool", "uint8", "float8e4m3fn"):
        assert bindings.data_type(dtype) is not None
    with pytest.raises(EngineError, match="float64"):
        bindings.data_type("float64")


def test_prepared_bidaf_parses_with_every_weight_refittable(bindings: Bindings, bidaf: Compilation) -> None:
    logger = bindings.logger()
    parsed = parse(bindings, logger, bidaf.compiled, evaluate(bidaf.compiled.program, bidaf.weights))
    assert parsed.network.num_inputs == 4
    names = [spec.name for spec in bidaf.compiled.engine_weights]
    assert len(names) > 20
    mark_refittable(logger, parsed.network, names)
    assert all(parsed.network.are_weights_marked_refittable(name) for name in names)
    with pytest.raises(EngineError, match="no_such_weight"):
        mark_refittable(logger, parsed.network, ["no_such_weight"])


def test_bidaf_as_published_is_refused_with_reasons_and_preparation_helps(bindings: Bindings) -> None:
    support = check_support(bindings, random_bidaf(), TensorRtOptions(dimensions=BIDAF_RANGES), build=True)
    refused = {node.op_type for node in support.before.refused}
    assert {"CategoryMapper", "Compress"} <= refused
    assert all(node.reason for node in support.before.refused)
    assert not support.before.parses
    assert support.after.parses
    assert support.built is True, support.build_error
    assert support.acceptable
    assert {"CategoryMapper", "Compress"} <= {change.op_type for change in support.changes}


def test_prepared_bidaf_builds_for_dynamic_shapes(bindings: Bindings, bidaf: Compilation, tmp_path: Path) -> None:
    """Ahead of time for another GPU, without refittable weights: what TensorRT-RTX does without a GPU."""
    if not bindings.is_rtx:
        pytest.skip("only TensorRT-RTX builds without a GPU")
    logger = bindings.logger()
    parsed = parse(bindings, logger, bidaf.compiled, evaluate(bidaf.compiled.program, bidaf.weights))
    options = TensorRtOptions(dimensions=BIDAF_RANGES, workspace=1 << 30, timing_cache=tmp_path / "cache")
    profile = plan_profile(bidaf.compiled.inputs, {}, options.dimensions, options.fallback)
    assert not profile.inferred
    plan = build_plan(bindings, logger, parsed, profile, options, refit=False, target="SM120")
    assert len(plan) > 10_000


def test_a_refittable_build_without_a_gpu_fails_with_tensorrts_words(bindings: Bindings, bidaf: Compilation) -> None:
    logger = bindings.logger()
    parsed = parse(bindings, logger, bidaf.compiled, evaluate(bidaf.compiled.program, bidaf.weights))
    profile = plan_profile(bidaf.compiled.inputs, {}, BIDAF_RANGES, Range(1, 1, 1))
    try:
        plan = build_plan(bindings, logger, parsed, profile, TensorRtOptions())
    except EngineError as error:
        assert "TensorRT could not build" in str(error)
        assert "no reason" not in str(error)
    else:
        assert plan, "there is a GPU: a plan came out"


def test_hardmax_along_a_dynamic_axis_parses_and_does_not_build(bindings: Bindings) -> None:
    """Why preparation replaces Hardmax though the parser takes it."""
    if not bindings.is_rtx:
        pytest.skip("only TensorRT-RTX builds without a GPU")
    graph = helper.make_graph(
        [helper.make_node("Hardmax", ["x"], ["y"], axis=1, name="hardmax")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert parser_verdict(bindings, model).parses
    compiled = compile_model(model).compiled
    logger = bindings.logger()
    profile = plan_profile(compiled.inputs, {}, {}, Range(1, 8, 16))
    with pytest.raises(EngineError, match="could not build"):
        build_plan(bindings, logger, parse(bindings, logger, compiled, {}), profile, TensorRtOptions(), refit=False)
    support = check_support(bindings, model, build=True)
    assert support.acceptable, support
    assert [change.op_type for change in support.changes] == ["Hardmax"]


def test_a_model_that_the_parser_refuses_names_node_and_reason(bindings: Bindings) -> None:
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"], name="the_determinant")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(UnsupportedModelError, match="the_determinant"):
        parse(bindings, bindings.logger(), compile_model(model).compiled, {})
    support = check_support(bindings, model)
    assert not support.acceptable
    assert [(node.name, node.op_type) for node in support.after.refused] == [("the_determinant", "Det")]


LIGHT_MODELS = sorted(path.stem for path in LIGHT.glob("*.onnx"))


@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_the_light_models_of_the_onnx_package_parse(bindings: Bindings, name: str) -> None:
    """Real architectures without their weights (which come from ConstantOfShape), through compile and parse."""
    model = prepare(onnx.load(LIGHT / f"{name}.onnx"), for_engine="tensorrt").model
    compilation = compile_model(model)
    weights = {
        spec.name: np.zeros(spec.static_shape, np.float32) if spec.dtype == "float32" else np.zeros(spec.static_shape)
        for spec in compilation.compiled.engine_weights
    }
    parsed = parse(bindings, bindings.logger(), compilation.compiled, weights)
    assert parsed.network.num_outputs == len(compilation.compiled.outputs)


def test_module_names_are_tried_from_the_fullest(bindings: Bindings) -> None:
    assert bindings.name in PACKAGES
    assert find_bindings(bindings.name).version == bindings.version


def test_weights_by_address_carry_the_dtype_that_prototypes_are_compared_by(bindings: Bindings) -> None:
    array = np.arange(6, dtype=np.float32)
    made = bindings.module.Weights(bindings.data_type("float32"), array.ctypes.data, array.size)
    assert made.dtype == bindings.data_type("float32")
    assert made.size == 6
    assert np.array_equal(made.numpy(), array)


def test_an_output_allocator_of_the_real_base_class(bindings: Bindings) -> None:
    device = FakeDevice()
    allocator = make_output_allocator(bindings.module, device)
    address = allocator.reallocate_output("y", 0, 100, 256)
    assert address in device.memory
    assert allocator.reallocate_output_async("y", address, 50, 256, 1) == address
    allocator.notify_shape("y", bindings.module.Dims([2, 3]))
    assert allocator.shape == (2, 3)
