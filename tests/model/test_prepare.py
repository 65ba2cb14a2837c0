import numpy as np
import pytest

from onnx_refit.errors import ModelError
from onnx_refit.model.passes import Change, PassResult, run_passes
from onnx_refit.model.prepare import ENGINES, prepare
from onnx_refit.model.verify import verify_equivalent
from tests.model.builders import model, node, operators, strings

ML = "ai.onnx.ml"


def everything():
    """Strings, a mapper, Dropout, Hardmax, Compress and a weight: no BiDAF, but all that prepare knows."""
    nodes = [
        node("CategoryMapper", ["x"], ["ids"], name="m", domain=ML, cats_strings=["a", "b"], cats_int64s=[1, 0]),
        node("Cast", ["ids"], ["f"], to=1),
        node("Dropout", ["f"], ["fd"], name="d"),
        node("Mul", ["fd", "w"], ["s"]),
        node("Identity", ["s"], ["t"]),
        node("Hardmax", ["t"], ["h"], name="h", axis=1),
        node("Cast", ["h"], ["b"], to=9),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Compress", ["s", "c"], ["best"], name="c"),
        node("Hardmax", ["t"], ["mark"], name="h2", axis=0),
        node("Greater", ["s", "zero"], ["positive"]),
        node("Reshape", ["positive", "flat"], ["p"]),
        node("Compress", ["s", "p"], ["kept"], name="c2"),
    ]
    outputs = {"best": ("float32", [1]), "mark": ("float32", [1, "n"]), "kept": ("float32", ["k"])}
    weights = {"w": np.array([2.0], np.float32), "flat": np.array([-1]), "zero": np.array(0, np.float32)}
    return model(nodes, {"x": ("string", [1, "n"])}, outputs, weights, opset=9, ml=1)


CASES = [{"x": strings(*words, shape=(1, -1))} for words in (["a", "b", "a"], ["b"], ["z", "z", "z", "b", "a"])]


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_at_once(engine):
    original = everything()
    prepared = prepare(original, for_engine=engine)
    assert not {"CategoryMapper", "Dropout", "Identity", "Hardmax", "Compress"} & set(operators(prepared.model))
    assert prepared.blockers == ()
    assert len(prepared.preprocessors) == 1
    assert "w" in {tensor.name for tensor in prepared.model.graph.initializer}
    assert verify_equivalent(original, prepared, CASES).cases == 3
    assert {change.op_type for change in prepared.changes} >= {"CategoryMapper", "Dropout", "Hardmax", "Compress"}
    assert all(change.why and change.what for change in prepared.changes)


def test_preparing_twice_changes_nothing_more():
    once = prepare(everything()).model
    again = prepare(once)
    assert again.changes == ()
    assert again.model is once


def test_a_model_that_needs_nothing_is_given_back():
    plain = model([node("Neg", ["x"], ["y"])], {"x": ("float32", [1])}, {"y": ("float32", [1])})
    assert prepare(plain).model is plain


def test_an_engine_nobody_knows():
    with pytest.raises(ModelError, match="no such engine: abacus"):
        prepare(everything(), for_engine="abacus")


def test_blockers_depend_on_the_engine():
    nodes = [
        node("Cast", ["x"], ["s"], to=8),
        node("CategoryMapper", ["s"], ["y"], name="m", domain=ML, cats_strings=["1"], cats_int64s=[5]),
        node("Neg", ["y"], ["z"]),
    ]
    original = model(nodes, {"x": ("int64", [2])}, {"z": ("int64", [2])}, ml=1)
    assert prepare(original, for_engine="onnxruntime").blockers == ()
    (blocker,) = prepare(original, for_engine="tensorrt").blockers
    assert (blocker.node, blocker.op_type) == ("m", "CategoryMapper")
    assert "no graph input" in blocker.reason
    assert len(prepare(original, for_engine="onnxruntime").notes) == 1


def test_string_inputs_block_engines_without_strings():
    nodes = [node("Reshape", ["x", "shape"], ["y"])]
    original = model(nodes, {"x": ("string", [2])}, {"y": ("string", [2, 1])}, {"shape": np.array([2, 1])})
    assert prepare(original, for_engine="cuda").blockers[0].node == "x"
    assert prepare(original).blockers == ()


def test_verify_finds_a_difference():
    original, prepared = everything(), prepare(everything())
    prepared.model.graph.initializer[0].CopyFrom(everything().graph.initializer[0])
    changed = next(tensor for tensor in prepared.model.graph.initializer if tensor.name == "w")
    changed.raw_data = np.array([3.0], np.float32).tobytes()
    with pytest.raises(ModelError, match=r"best: outputs differ by up to 1"):
        verify_equivalent(original, prepared, CASES[0])


def test_verify_says_what_does_not_run():
    with pytest.raises(ModelError, match="does not run on these inputs"):
        verify_equivalent(everything(), prepare(everything()), {"x": np.ones(3, np.float32)})


class Broken:
    name = "broken"

    def __init__(self, missing=None, left=None):
        self.missing, self.left = missing, left

    def requires(self, model):
        return self.missing

    def call(self, model):
        return PassResult(model, (Change("n", "Op", "nothing", "no reason"),))

    def ensures(self, model):
        return self.left


def test_the_contract_of_passes_is_held():
    plain = everything()
    with pytest.raises(ModelError, match="broken: the pass cannot run: no luck"):
        run_passes(plain, [Broken(missing="no luck")])
    with pytest.raises(ModelError, match="broken: the pass did not keep its promise: a Compress is left"):
        run_passes(plain, [Broken(left="a Compress is left")])
    assert run_passes(plain, [Broken()])[1][0][1].modified
