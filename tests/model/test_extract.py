import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_refit.model.extract import ExtractVocabularies
from onnx_refit.model.graph import all_graphs
from onnx_refit.model.prepare import prepare
from onnx_refit.model.verify import verify_equivalent
from tests.model.builders import apply, graph, model, node, operators, strings

ML = "ai.onnx.ml"
STRINGS = ("", "the", "fox", "ü")
X = {"x": strings("fox", "cat", "", "ü", "the", "THE", shape=(2, 3))}


def mapper(source="x", target="y", name="words", **attributes):
    given = {"cats_strings": STRINGS, "cats_int64s": (0, 2, 3, 4), "default_int64": 1} | attributes
    return node("CategoryMapper", [source], [target], name=name, domain=ML, **given)


def test_category_mapper_from_strings():
    original = model(
        [mapper(), node("Cast", ["y"], ["z"], to=1)], {"x": ("string", ["a", 3])}, {"z": ("float32", ["a", 3])}, ml=1
    )
    result = apply(ExtractVocabularies(), original, X)
    (table,) = result.preprocessors
    assert (table.input, table.output, table.node, table.op_type) == ("x", "y", "words", "CategoryMapper")
    assert (table.key_dtype, table.value_dtype, table.default) == ("string", "int64", 1)
    assert dict(zip(table.keys, table.values, strict=True)) == {"": 0, "the": 2, "fox": 3, "ü": 4}
    (made,) = result.model.graph.input
    assert made.name == "y"
    assert made.type.tensor_type.elem_type == TensorProto.INT64
    assert [d.dim_param or d.dim_value for d in made.type.tensor_type.shape.dim] == ["a", 3]
    (change,) = result.changes
    assert change.node == "words"
    assert "4 entries" in change.what


def test_category_mapper_from_integers():
    original = model(
        [mapper(default_string="what?"), mapper("y", "z", "back")],
        {"x": ("int64", [4])},
        {"z": ("int64", [4])},
        ml=1,
    )
    result = apply(ExtractVocabularies(), original, {"x": np.array([0, 4, 9, 2])})
    first, second = result.preprocessors
    assert (first.key_dtype, first.value_dtype, first.default) == ("int64", "string", "what?")
    assert second.key_dtype == "string"
    assert operators(result.model) == ["Identity"]


@pytest.mark.parametrize("imported", [False, True])
def test_a_model_of_one_mapper_that_imports_only_its_domain(imported):
    original = model([mapper()], {"x": ("string", [2])}, {"y": ("int64", [2])}, ml=1)
    if not imported:
        del original.opset_import[0]
    prepared = prepare(original)
    assert operators(prepared.model) == ["Identity"]
    verify_equivalent(original, prepared, {"x": strings("a", "?")})


def test_category_mapper_defaults_are_those_of_the_operator():
    bare = node("CategoryMapper", ["x"], ["y"], domain=ML, cats_strings=["a"], cats_int64s=[5])
    original = model([bare, node("Cast", ["y"], ["z"], to=1)], {"x": ("string", [2])}, {"z": ("float32", [2])}, ml=1)
    result = apply(ExtractVocabularies(), original, {"x": strings("a", "b")})
    assert result.preprocessors[0].default == -1
    assert result.preprocessors[0].node == "y"  # an unnamed node is called by its output


def test_a_rank_4_category_mapper():
    original = model(
        [mapper(), node("Cast", ["y"], ["z"], to=1)],
        {"x": ("string", ["c", 1, 1, 3])},
        {"z": ("float32", ["c", 1, 1, 3])},
        opset=9,
        ml=1,
    )
    apply(ExtractVocabularies(), original, {"x": X["x"].reshape(2, 1, 1, 3)})


ENCODERS = [
    (1, {"classes_strings": ["a", "b", "c"], "default_int64": -7}, "string", "int64"),
    (1, {"classes_strings": ["a", "b", "c"], "default_string": "none"}, "int64", "string"),
    (2, {"keys_strings": ["a", "b"], "values_int64s": [5, 6], "default_int64": 9}, "string", "int64"),
    (2, {"keys_strings": ["a", "b"], "values_floats": [0.5, 6.25], "default_float": 0.25}, "string", "float32"),
    (2, {"keys_strings": ["a", "b"], "values_strings": ["x", "y"], "default_string": "z"}, "string", "string"),
    (2, {"keys_int64s": [1, 0], "values_floats": [0.5, 6.25]}, "int64", "float32"),
    (2, {"keys_int64s": [1, 0], "values_strings": ["x", "y"]}, "int64", "string"),
    (2, {"keys_int64s": [1, 0], "values_int64s": [0, 1]}, "int64", "int64"),
    (2, {"keys_floats": [1.0, 0.1], "values_int64s": [3, 4]}, "float32", "int64"),
    (2, {"keys_floats": [1.0, 0.1], "values_floats": [3.0, 4.5], "default_float": 2.0}, "float32", "float32"),
    (2, {"keys_floats": [1.0, 0.1], "values_strings": ["x", "y"]}, "float32", "string"),
    (4, {"keys_strings": ["a", "b"], "values_int64s": [5, 6], "default_int64": 9}, "string", "int64"),
    (4, {"keys_floats": [1.0, float("nan")], "values_int64s": [3, 4]}, "float32", "int64"),
]
SAMPLES = {
    "string": strings("a", "b", "z", "", shape=(2, 2)),
    "int64": np.array([[0, 1], [2, -5]]),
    "float32": np.array([[1.0, 0.1], [np.nan, 7.0]], np.float32),
    "float64": np.array([[1.0, 0.1], [0.25, 7.0]]),
    "int16": np.array([[1, 2], [3, 300]], np.int16),
}


def encoder_model(attributes, key, value, version):
    nodes = [node("LabelEncoder", ["x"], ["y"], name="labels", domain=ML, **attributes)]
    if value != "string":  # something that the engine computes with
        nodes.append(node("Cast", ["y"], ["z"], to=1))
        return model(nodes, {"x": (key, [2, 2])}, {"z": ("float32", [2, 2])}, ml=version)
    nodes.append(node("Reshape", ["y", "shape"], ["z"]))
    return model(nodes, {"x": (key, [2, 2])}, {"z": ("string", [4])}, {"shape": np.array([4])}, ml=version)


@pytest.mark.parametrize(("version", "attributes", "key", "value"), ENCODERS)
def test_label_encoder(version, attributes, key, value):
    original = encoder_model(attributes, key, value, version)
    result = apply(ExtractVocabularies(), original, {"x": SAMPLES[key]})
    (table,) = result.preprocessors
    assert (table.key_dtype, table.value_dtype) == (key, value)
    assert "LabelEncoder" not in operators(result.model)


def tensor(dtype, *elements):
    return helper.make_tensor("t", getattr(TensorProto, dtype), [len(elements)], elements)


@pytest.mark.parametrize(
    ("keys", "values", "default", "key", "value"),
    [
        (("STRING", b"a", b"b"), ("INT64", 5, 6), ("INT64", 9), "string", "int64"),
        (("DOUBLE", 1.0, 0.1), ("DOUBLE", 0.5, 0.25), ("DOUBLE", 3.0), "float64", "float64"),
        (("INT64", 1, 0), ("STRING", b"x", b"y"), ("STRING", b"z"), "int64", "string"),
        (("FLOAT", 1.0, 0.1), ("INT64", 5, 6), None, "float32", "int64"),
        (("STRING", b"a", b"b"), ("INT16", 5, 6), ("INT16", 9), "string", "int16"),
    ],
)
def test_label_encoder_4_with_tensors(keys, values, default, key, value):
    attributes = {"keys_tensor": tensor(*keys), "values_tensor": tensor(*values)}
    if default is not None:
        attributes["default_tensor"] = tensor(*default)
    result = apply(ExtractVocabularies(), encoder_model(attributes, key, value, 4), {"x": SAMPLES[key]})
    assert (result.preprocessors[0].key_dtype, result.preprocessors[0].value_dtype) == (key, value)


def test_several_readers_of_the_mapped_tensor():
    nodes = [mapper(), node("Cast", ["y"], ["a"], to=1), node("Add", ["y", "one"], ["b"])]
    outputs = {"a": ("float32", [2, 3]), "b": ("int64", [2, 3])}
    original = model(nodes, {"x": ("string", [2, 3])}, outputs, {"one": np.array(1)}, ml=1)
    assert len(apply(ExtractVocabularies(), original, X).preprocessors) == 1


def test_an_input_that_others_read_too_stays():
    nodes = [
        node("LabelEncoder", ["x"], ["y"], domain=ML, keys_int64s=[1], values_int64s=[5]),
        node("Add", ["x", "y"], ["z"]),
    ]
    original = model(nodes, {"w": ("int64", [1]), "x": ("int64", [2])}, {"z": ("int64", [2])}, ml=2)
    result = apply(ExtractVocabularies(), original, {"w": np.array([0]), "x": np.array([1, 2])})
    assert [value.name for value in result.model.graph.input] == ["w", "x", "y"]
    assert "stays for its other readers" in result.changes[0].what


def test_two_mappers_on_one_input():
    nodes = [mapper(), mapper(target="z", name="again", default_int64=8), node("Add", ["y", "z"], ["sum"])]
    original = model(nodes, {"x": ("string", [2, 3])}, {"sum": ("int64", [2, 3])}, ml=1)
    result = apply(ExtractVocabularies(), original, X)
    assert [value.name for value in result.model.graph.input] == ["y", "z"]


def test_a_mapped_tensor_that_is_a_graph_output():
    original = model([mapper()], {"x": ("string", [2, 3])}, {"y": ("int64", [2, 3])}, ml=1)
    result = apply(ExtractVocabularies(), original, X)
    assert operators(result.model) == ["Identity"]
    assert result.preprocessors[0].output == "y_mapped"


def labels(source, target, name="names"):
    return mapper(source, target, name, default_string="?")


def test_a_mapper_on_a_graph_output_becomes_a_postprocessor():
    nodes = [node("ArgMax", ["x"], ["index"], axis=1, keepdims=0), labels("index", "label")]
    original = model(nodes, {"x": ("float32", ["n", 5])}, {"label": ("string", ["n"])}, ml=1)
    case = {"x": np.random.default_rng(0).random((6, 5), np.float32)}
    result = apply(ExtractVocabularies(), original, case)
    (table,) = result.postprocessors
    assert (table.input, table.output, table.key_dtype, table.value_dtype) == ("index", "label", "int64", "string")
    assert result.model.graph.output[0].name == "index"
    assert result.model.graph.output[0].type.tensor_type.elem_type == TensorProto.INT64
    assert not apply(ExtractVocabularies(outputs=False), original).modified


def test_a_postprocessor_beside_its_own_input():
    nodes = [node("ArgMax", ["x"], ["index"], axis=1, keepdims=0), labels("index", "label")]
    outputs = {"label": ("string", ["n"]), "index": ("int64", ["n"])}
    original = model(nodes, {"x": ("float32", ["n", 5])}, outputs, ml=1)
    result = apply(ExtractVocabularies(), original, {"x": np.eye(5, dtype=np.float32)})
    assert [value.name for value in result.model.graph.output] == ["index"]


def test_postprocessors_in_a_row():
    nodes = [
        node("ArgMax", ["x"], ["index"], axis=1, keepdims=0),
        labels("index", "label"),
        node("LabelEncoder", ["label"], ["nice"], domain=ML, keys_strings=["fox"], values_strings=["Fox!"]),
    ]
    original = model(nodes, {"x": ("float32", [5, 5])}, {"nice": ("string", [5])}, ml=2)
    result = apply(ExtractVocabularies(), original, {"x": np.eye(5, dtype=np.float32)})
    assert [one.output for one in result.postprocessors] == ["label", "nice"]


def refused(original):
    result = ExtractVocabularies().call(original)
    (blocker,) = result.blockers
    return blocker.reason


def test_what_cannot_leave_says_why():
    inside = [node("Cast", ["x"], ["s"], to=TensorProto.STRING), mapper("s", "y"), node("Neg", ["y"], ["z"])]
    original = model(inside, {"x": ("int64", [2])}, {"z": ("int64", [2])}, ml=1)
    assert "no graph input but the output of s (Cast)" in refused(original)

    constant = model(
        [mapper("w", "y"), node("Add", ["y", "x"], ["z"])],
        {"x": ("int64", [1])},
        {"z": ("int64", [1])},
        {"w": np.array(["fox"], object)},
        ml=1,
    )
    assert "initializer" in refused(constant)

    twice = [node("LabelEncoder", ["x"], ["y"], domain=ML, keys_strings=["a", "a"], values_int64s=[1, 2])]
    twice.append(node("Neg", ["y"], ["z"]))
    assert "two values" in refused(model(twice, {"x": ("string", [1])}, {"z": ("int64", [1])}, ml=2))

    wrong = [node("LabelEncoder", ["x"], ["y"], domain=ML, keys_strings=["a"], values_int64s=[1])]
    wrong.append(node("Neg", ["y"], ["z"]))
    assert "input is int64" in refused(model(wrong, {"x": ("int64", [1])}, {"z": ("int64", [1])}, ml=2))

    uneven = [mapper(cats_int64s=[1, 2]), node("Neg", ["y"], ["z"])]
    assert "4 strings but 2 integers" in refused(model(uneven, {"x": ("string", [1])}, {"z": ("int64", [1])}, ml=1))

    used = [
        node("ArgMax", ["x"], ["i"], axis=1),
        labels("i", "label"),
        mapper("label", "n", "back"),
        node("Neg", ["n"], ["m"]),
    ]
    both = model(used, {"x": ("float32", [2, 2])}, {"label": ("string", [2, 1]), "m": ("int64", [2, 1])}, ml=1)
    reasons = [one.reason for one in ExtractVocabularies().call(both).blockers]
    assert any("also read inside" in reason for reason in reasons)


def test_a_mapper_in_a_subgraph_stays():
    then = graph([mapper(), node("Neg", ["y"], ["r"])], {}, {"r": ("int64", [2])})
    other = graph([node("Identity", ["n"], ["r2"])], {}, {"r2": ("int64", [2])})
    nodes = [node("If", ["c"], ["z"], then_branch=then, else_branch=other)]
    inputs = {"x": ("string", [2]), "c": ("bool", []), "n": ("int64", [2])}
    original = model(nodes, inputs, {"z": ("int64", [2])}, ml=1)
    result = ExtractVocabularies().call(original)
    assert not result.modified
    assert "sub-graph" in result.blockers[0].reason
    assert any(operator == "CategoryMapper" for g in all_graphs(result.model.graph) for operator in operators(g))


def test_an_input_read_in_a_subgraph_too_stays():
    then = graph([node("Identity", ["x"], ["r"])], {}, {"r": ("int64", [2])})
    other = graph([node("Neg", ["y"], ["r2"])], {}, {"r2": ("int64", [2])})
    nodes = [
        node("LabelEncoder", ["x"], ["y"], domain=ML, keys_int64s=[1], values_int64s=[5]),
        node("If", ["c"], ["z"], then_branch=then, else_branch=other),
    ]
    original = model(nodes, {"x": ("int64", [2]), "c": ("bool", [])}, {"z": ("int64", [2])}, ml=2)
    cases = [{"x": np.array([1, 2]), "c": np.array(flag)} for flag in (True, False)]
    result = apply(ExtractVocabularies(), original, *cases)
    assert [value.name for value in result.model.graph.input] == ["x", "y", "c"]


def test_a_model_without_mappers_is_given_back():
    original = model([node("Neg", ["x"], ["y"])], {"x": ("float32", [1])}, {"y": ("float32", [1])})
    assert ExtractVocabularies().call(original).model is original
