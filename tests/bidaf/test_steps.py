"""Prepare, build, refit and infer: the three steps of the sample, with the words it says."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnx_refit.errors import ModelError, PlanError, PlanFormatError, PlanMismatchError, WeightsError
from onnx_refit.files import WriteError
from onnx_refit.model.verify import Runner
from onnx_refit.model.vocabulary import VocabularyMap, apply_maps
from onnx_refit.plan.plan import Plan
from onnx_refit.samples.bidaf.build import get_plan
from onnx_refit.samples.bidaf.prepare import load_maps, prepare_bidaf
from onnx_refit.samples.bidaf.sample import Outcome, refit_and_infer
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds


def quiet(line: str) -> None:
    """Drop what a step says."""


def test_prepare_says_the_words_of_the_sample(sample):
    assert sample.prepare_lines == (
        "Modifying the ONNX model ...",
        "Modified ONNX model saved as bidaf-modified.onnx",
        "Done.",
    )


def test_the_modified_model_has_integer_inputs_and_no_odd_operators(sample):
    model = onnx.load(sample.modified)
    onnx.checker.check_model(model)
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [onnx.TensorProto.INT64] * 4
    left = {node.op_type for node in model.graph.node}
    assert not left & {"CategoryMapper", "Hardmax", "Compress", "Scan", "Dropout", "Identity"}
    assert "ArgMax" in left


def test_weights_keep_names_and_values(sample, original_model):
    before = {tensor.name: tensor for tensor in original_model.graph.initializer}
    after = {tensor.name: tensor for tensor in onnx.load(sample.modified).graph.initializer}
    for name, tensor in before.items():
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            assert after[name].SerializeToString() == tensor.SerializeToString()


def test_the_vocabularies_lie_beside_the_model(sample):
    maps = [VocabularyMap.load(sample.directory / f"CategoryMapper_{number}.json") for number in range(4, 8)]
    assert [one.input for one in maps] == ["context_word", "context_char", "query_word", "query_char"]
    assert maps[1].apply(np.array(["", "ﷺ"])).tolist() == [0, 1]
    assert load_maps(onnx.load(sample.modified), sample.directory) == tuple(maps)
    assert sample.plan.preprocessors == tuple(maps)


def test_original_modified_and_engine_agree(sample, original_model, questions, shared_engine):
    before, after = Runner(original_model), Runner(onnx.load(sample.modified))
    for question in questions:
        case = feeds(Passage.of(question.context), Passage.of(question.text))
        expected = before.run(case)
        mapped = apply_maps(sample.plan.preprocessors, case)
        for got in (after.run({name: mapped[name] for name in after.inputs}), shared_engine.run(case)):
            assert got["start_pos"].tolist() == expected["start_pos"].tolist()
            assert got["end_pos"].tolist() == expected["end_pos"].tolist()
            assert np.allclose(got["start_scores"].astype(float), expected["start_scores"].astype(float), atol=1e-3)


def test_the_reference_evaluator_agrees_about_the_modified_model(sample, original_model):
    """ONNX's own evaluator, an implementation that shares nothing with ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    case = feeds(Passage.of("The cat is in the old house."), Passage.of("Where is the cat?"))
    expected = Runner(original_model).run(case)
    mapped = apply_maps(sample.plan.preprocessors, case)
    evaluator = ReferenceEvaluator(str(sample.modified))
    got = evaluator.run(None, {one.output: mapped[one.output] for one in sample.plan.preprocessors})
    assert [np.asarray(one).tolist() for one in list(got)[:2]] == [
        expected["start_pos"].tolist(),
        expected["end_pos"].tolist(),
    ]


def test_verbose_says_what_each_pass_did(sample, tmp_path):
    lines: list[str] = []
    prepare_bidaf(sample.original, tmp_path / "m.onnx", lines.append, verbose=True, verify=False)
    text = "\n".join(lines)
    for part in (
        "CategoryMapper_4",
        "Hardmax_23",
        "Compress_27",
        "Scan_20",
        "replaced by ArgMax",
        "(it does nothing at",
    ):
        assert part in text
    assert lines[-2:] == ["Modified ONNX model saved as m.onnx", "Done."]


def test_prepare_refuses_what_is_not_the_original(sample, tmp_path):
    with pytest.raises(ModelError, match="nothing to modify"):
        prepare_bidaf(sample.modified, tmp_path / "m.onnx", print)
    with pytest.raises(ModelError, match="no such file"):
        prepare_bidaf(tmp_path / "none.onnx", tmp_path / "m.onnx", print)
    assert list(tmp_path.iterdir()) == []


def test_prepare_into_a_place_that_is_not_there(original_model, tmp_path):
    with pytest.raises(WriteError, match="no such directory"):
        prepare_bidaf(original_model, tmp_path / "none" / "m.onnx", quiet, verify=False)


def test_build_says_the_words_of_the_sample(sample):
    path = sample.modified
    assert sample.build_lines == (
        f"Loading ONNX file from path {path}...",
        "Beginning ONNX file parsing",
        "Completed parsing of ONNX file",
        "Network inputs:",
        "CategoryMapper_4_output int64 (-1, 1)",
        "CategoryMapper_5_output int64 (-1, 1, 1, 16)",
        "CategoryMapper_6_output int64 (-1, 1)",
        "CategoryMapper_7_output int64 (-1, 1, 1, 16)",
        f"Building an engine from file {path}; this may take a while...",
        "Completed creating Engine",
    )


def test_the_second_run_reads_the_plan(sample):
    lines: list[str] = []
    written = sample.plan_path.stat().st_mtime_ns
    plan = get_plan(sample.modified, sample.plan_path, lines.append)
    assert lines == [f"Reading engine from file {sample.plan_path}"]
    assert plan.fingerprint == sample.plan.fingerprint
    assert sample.plan_path.stat().st_mtime_ns == written


@pytest.fixture
def copies(sample, tmp_path):
    """Modified model, vocabularies and plan, to be damaged."""
    for path in sample.directory.glob("*"):
        if path != sample.original and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "bidaf-modified.onnx", tmp_path / "bidaf.plan"


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data[: len(data) // 2], PlanFormatError),
        (lambda data: b"", PlanFormatError),
        (lambda data: b"no plan at all", PlanFormatError),
        (lambda data: data[:-500_000] + bytes([data[-500_000] ^ 1]) + data[-499_999:], PlanFormatError),
    ],
    ids=["cut", "empty", "other", "one bit"],
)
def test_a_damaged_plan_is_refused_and_rebuilt_when_asked(copies, damage, error):
    model, plan_path = copies
    data = plan_path.read_bytes()
    damaged = damage(data)
    plan_path.write_bytes(damaged)
    with pytest.raises(error, match="--rebuild"):
        get_plan(model, plan_path, quiet)
    assert plan_path.read_bytes() == damaged, "a refused plan must be left alone"


def test_a_plan_is_rebuilt_when_asked(copies):
    model, plan_path = copies
    plan_path.write_bytes(b"no plan")
    lines: list[str] = []
    get_plan(model, plan_path, lines.append, rebuild=True)
    assert "Completed creating Engine" in lines
    assert Plan.load(plan_path).refittable


def test_a_plan_of_another_model_is_refused(copies):
    model_path, plan_path = copies
    model = onnx.load(model_path)
    model.doc_string = "another"
    model.graph.initializer[1].raw_data = bytes(len(model.graph.initializer[1].raw_data))
    onnx.save(model, model_path)
    with pytest.raises(PlanMismatchError, match="--rebuild"):
        get_plan(model_path, plan_path, quiet)


def test_a_plan_with_another_vocabulary_is_refused(copies):
    model_path, plan_path = copies
    file = model_path.parent / "CategoryMapper_5.json"
    replace(VocabularyMap.load(file), default=0).save(file)
    with pytest.raises(PlanMismatchError, match="other vocabularies"):
        get_plan(model_path, plan_path, quiet)


def test_a_plan_for_another_engine_is_refused(copies):
    with pytest.raises(PlanError, match="built for the engine onnxruntime, not for cuda"):
        get_plan(copies[0], copies[1], quiet, engine="cuda")


def test_a_missing_vocabulary_is_named(copies):
    model_path, plan_path = copies
    (model_path.parent / "CategoryMapper_6.json").unlink()
    (model_path.parent / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ModelError, match="no vocabulary file beside the model feeds query_word"):
        get_plan(model_path, plan_path, quiet, rebuild=True)


@pytest.mark.parametrize("everything", [False, True])
def test_refit_and_infer(engine, sample, everything):
    lines: list[str] = []
    outcome = refit_and_infer(engine, sample.plan.weights, lines.append, everything=everything)
    assert outcome.passed
    assert outcome.right == "brown"
    assert outcome.fake != "brown"
    assert lines == ["Refitting engine...", "Doing inference..."] * 2 + ["Passed"]
    assert engine.version == 3


def test_wrong_weights_do_not_pass(engine, sample):
    wrong = {name: np.zeros_like(array) for name, array in sample.plan.weights.items()}
    lines: list[str] = []
    outcome = refit_and_infer(engine, wrong, lines.append)
    assert not outcome.passed
    assert "Passed" not in lines
    assert "expected" in outcome.explanation()
    assert repr(outcome.right) in outcome.explanation()


def test_fake_weights_that_answer_rightly_do_not_pass():
    assert not Outcome(fake="brown", right="brown", expected="brown").passed
    assert Outcome(fake="", right="Brown", expected="brown").passed


def test_refitting_needs_the_two_tensors(engine):
    with pytest.raises(WeightsError, match="the model has no weights Parameter576_B_0"):
        refit_and_infer(engine, {}, quiet)
