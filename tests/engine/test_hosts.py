"""Weights written packed into a session's memory: to the bit what ONNX Runtime packs, and never under a request."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import onnx_refit
from onnx_refit.engine.onnxruntime import artefact, hosts, specialise
from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.boxes import PADDING, boxes
from onnx_refit.engine.onnxruntime.hosts import HostPool, NoHostError
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.packed import Packed, composed, learn
from onnx_refit.engine.onnxruntime.proof import proved
from onnx_refit.errors import EngineError
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk, evaluate, whole
from onnx_refit.plan.trace.recognise import Numbering
from onnx_refit.tensors import Array, TensorSpec

from .test_models import Live

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="in place on Linux only")
NAMES = ("lstm", "gru")


def decision(decisions: Iterator[Decision]) -> Decision:
    (found,) = [d for d in decisions if d.action == "write them packed, in place"]
    return found


def pool_of(live: Live) -> HostPool:
    assert live.backend._hosts is not None
    return live.backend._hosts


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_a_prepacked_session_to_the_bit_and_at_once(name: str) -> None:
    live, tiers = Live(name), Live(name, in_place=False)
    assert decision(iter(live.backend.decisions)).verdict is Verdict.ACCEPTED
    for seed in range(3):
        other = live.other(seed)
        made, prepacked = live.backend.derive(other), tiers.backend.derive(other)
        assert made.full_speed.done()
        assert prepacked.full_speed.wait(60)
        got, wanted = live.backend.run(made, live.inputs), tiers.backend.run(prepacked, live.inputs)
        assert all(got[key].tobytes() == wanted[key].tobytes() for key in wanted)
    live.backend.close()
    tiers.backend.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_refits_use_few_sessions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_PATIENCE", 1e6)  # no spare in the background: each session made is counted
    live = Live(name)
    pool = pool_of(live)
    made = before = live.backend.derive(live.weights)
    for seed in range(100):
        before, made = made, live.backend.derive(live.other(seed % 7), made)
    live.check(made, live.other(99 % 7))
    live.check(before, live.other(98 % 7))
    assert next(pool._numbers) <= 3
    live.backend.close()


@pytest.mark.parametrize("name", NAMES)
def test_source_weights_come_back_from_packed_ones(name: str) -> None:
    live = Live(name)
    made = live.backend.derive(live.weights)
    assert live.backend.recoverable == set(live.weights)
    for key, array in live.weights.items():
        assert live.backend.recover(made, key).tobytes() == array.tobytes()
    live.backend.close()


@pytest.mark.parametrize("name", NAMES)
def test_partial_refits_copy_what_differs_and_leave_others_alone(name: str) -> None:
    live = Live(name)
    sets = [(live.weights, live.backend.derive(live.weights))]
    rng = np.random.default_rng(0)
    for turn in range(12):
        weights, base = sets[rng.integers(len(sets))]
        some = frozenset(rng.choice(sorted(weights), 1 + turn % 2, replace=False).tolist())
        changed = {**weights, **{key: array for key, array in live.other(turn).items() if key in some}}
        needed = {key: changed[key] for key in live.backend.required(some)}
        sets.append((changed, live.backend.derive(needed, base, some)))
        if len(sets) > 4:
            del sets[int(rng.integers(len(sets)))]
        for weights, made in sets:
            live.check(made, weights)
            for key, array in weights.items():
                assert live.backend.recover(made, key).tobytes() == array.tobytes()
    live.backend.close()


def test_a_change_of_nothing_that_is_packed_shares_the_session() -> None:
    live = Live("lstm")
    base = live.backend.derive(live.weights)
    made = live.backend.derive({}, base, frozenset())
    assert made.runner.session is base.runner.session
    assert made.shared_nbytes == made.nbytes
    del base
    gc.collect()
    other = live.backend.derive(live.other(0))
    assert other.runner.session is not made.runner.session
    live.check(made, live.weights)
    live.backend.close()


def test_memory_in_use_is_not_written() -> None:
    live = Live("lstm")
    sets = [live.backend.derive(live.other(seed)) for seed in range(6)]
    assert len({id(made.runner.session) for made in sets}) == 6
    addresses = [s.flat.ctypes.data for m in sets for s in (b.storage for b in m.buffers.values())]
    assert len(set(addresses)) == len(addresses)
    for seed, made in enumerate(sets):
        live.check(made, live.other(seed))
    live.backend.close()
    del sets
    gc.collect()


def test_a_spare_session_gives_its_memory_back_and_serves_again() -> None:
    live = Live("lstm")
    pool = pool_of(live)
    sets = [live.backend.derive(live.weights) for _ in range(3)]
    sets.clear()
    gc.collect()
    assert pool.spare
    (first, *_) = [s.flat for name, s in pool.spare[-1].storages.items() if "@" in name]
    written = first.copy()
    pool.cool()
    assert first.tobytes() != written.tobytes()  # the file's again
    made = live.backend.derive(live.other(1))
    live.check(made, live.other(1))
    assert live.backend.derive({}, made, frozenset()) is not None
    live.backend.close()


def test_a_failed_derivation_leaves_nothing_half_written() -> None:
    live = Live("lstm")
    base = live.backend.derive(live.weights)
    for _ in range(4):
        with pytest.raises(EngineError):
            live.backend.derive({})
        live.check(base, live.weights)
    made = live.backend.derive(live.other(0))
    live.check(made, live.other(0))
    live.backend.close()


def test_sessions_can_be_made_after_somebody_tidied_the_temporary_folder() -> None:
    live = Live("lstm")
    pool = pool_of(live)
    pool.prepare()
    assert pool._folder is not None
    shutil.rmtree(pool._folder.name)
    sets = [live.backend.derive(live.other(seed)) for seed in range(4)]
    for seed, made in enumerate(sets):
        live.check(made, live.other(seed))
    live.backend.close()


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    live = Live("lstm")
    live.backend.derive(live.weights)
    janitor = pool_of(live)._janitor
    live.backend.close()
    assert janitor is not None
    janitor.join(30)
    assert not janitor.is_alive()
    assert threading.active_count() <= before + 1  # the janitor of spare memory ends by itself
    folder = pool_of(live)._folder
    assert folder is not None
    assert not Path(folder.name).exists()


def test_without_a_temporary_folder_there_are_two_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live("lstm")
    compiled = compile_model(live.model).compiled
    data = live.backend.artefact()

    def fail(*_: object) -> None:
        raise NoHostError("no packed weights can be written to a temporary file")

    with monkeypatch.context() as patch:
        patch.setattr(HostPool, "_write", fail)
        backend = create(compiled, None, OnnxRuntimeOptions(threads=1), data)
    assert decision(iter(backend.decisions)).verdict is Verdict.REJECTED
    made = backend.derive(live.weights)
    assert made.full_speed.wait(60)
    live.backend.close()
    backend.close()


@pytest.mark.parametrize("broken", ["recipe", "maps"])
def test_what_does_not_answer_alike_is_not_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "maps":
        monkeypatch.setattr(hosts, "_mapped", lambda path: [])
    else:

        def wrong(*arguments: object) -> Packed | None:
            packed = learn(*arguments)  # type: ignore[arg-type]
            assert packed is not None
            first, *rest = packed.blocks
            piece = first.recipe.pieces[0]
            walk = piece.operands[0].walk
            moved = Operand(piece.operands[0].name, Walk(walk.offset + 1, walk.strides))
            shorter = (piece.dims[0] - 1, *piece.dims[1:])
            pieces = (Piece(shorter, piece.target, (moved,)), *first.recipe.pieces[1:])
            return replace(packed, blocks=(replace(first, recipe=Recipe(first.recipe.spec, pieces)), *rest))

        monkeypatch.setattr(specialise, "learn", wrong)
    live = Live("lstm")
    assert live.backend._hosts is None
    assert decision(iter(live.backend.decisions)).verdict is Verdict.REJECTED
    made = live.backend.derive(live.weights)
    assert made.full_speed.wait(60)
    live.check(made, live.weights)
    live.backend.close()


def test_an_artefact_holds_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live("gru")
    compiled = compile_model(live.model).compiled
    monkeypatch.setattr(specialise, "learn", None)
    backend = create(compiled, None, OnnxRuntimeOptions(threads=1), live.backend.artefact())
    got = backend.run(backend.derive(live.weights), live.inputs)
    wanted = live.backend.run(live.backend.derive(live.weights), live.inputs)
    assert all(got[key].tobytes() == wanted[key].tobytes() for key in wanted)
    assert artefact.load(live.backend.artefact() or b"", "another host") is None
    live.backend.close()
    backend.close()


def recurrence(op_type: str, width: int, hidden: int, direction: str) -> tuple[onnx.ModelProto, dict[str, TensorSpec]]:
    both = 2 if direction == "bidirectional" else 1
    gates = {"LSTM": 4, "GRU": 3}[op_type] * hidden
    shapes = {"W": (both, gates, width), "R": (both, gates, hidden), "B": (both, 2 * gates)}
    node = helper.make_node(op_type, ["x", *shapes], ["y"], hidden_size=hidden, direction=direction)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", "b", width])]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "r", values, [output]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    return model, {name: TensorSpec(name, "float32", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("op_type", "width", "hidden", "direction"),
    [
        ("LSTM", 1, 1, "forward"),
        ("LSTM", 5, 7, "bidirectional"),
        ("LSTM", 700, 33, "reverse"),
        ("LSTM", 257, 100, "bidirectional"),
        ("GRU", 3, 5, "bidirectional"),
        ("GRU", 600, 270, "forward"),
    ],
)
def test_any_size_is_learnt_and_read_back(op_type: str, width: int, hidden: int, direction: str) -> None:
    model, specs = recurrence(op_type, width, hidden, direction)
    packed = learn(model, specs)
    assert packed is not None
    assert {spec.name for spec in packed.specs} == {"W", "R"}
    assert [spec.name for spec in packed.adopted] == ["B"]
    assert proved(model, packed)
    rng = np.random.default_rng(0)
    for spec in packed.specs:
        weight = rng.standard_normal(spec.static_shape, np.float32)
        blocks = [block for block in packed.blocks if block.weight == spec.name]
        flat = {block.name: evaluate(block.recipe, {spec.name: weight.reshape(-1)}.__getitem__) for block in blocks}
        assert packed.unpacked(spec, flat).tobytes() == weight.tobytes()
        for block in blocks:
            same = composed(block, whole(spec, "source"), {"source": spec.size})
            assert same is not None
            assert evaluate(same, {"source": weight.reshape(-1)}.__getitem__).tobytes() == flat[block.name].tobytes()


def test_a_weight_that_somebody_reads_plain_too_is_not_packed() -> None:
    model, specs = recurrence("LSTM", 4, 4, "forward")
    model.graph.node.append(helper.make_node("ReduceSum", ["W"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    packed = learn(model, specs)
    assert packed is not None
    assert {spec.name for spec in packed.specs} == {"R"}
    model.graph.output.append(helper.make_tensor_value_info("R", TensorProto.FLOAT, [1, 16, 4]))
    assert learn(model, specs) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_boxes_give_back_any_arrangement(data: st.DataObject) -> None:
    """Tiles, cut and turned and padded as kernels do, and pure chance: the recipe is exact, or there is none."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    numbering = Numbering.of([TensorSpec(f"t{k}", "float32", (size,)) for k, size in enumerate(sizes)])
    total = sum(sizes)
    if data.draw(st.booleans()):
        rows = data.draw(st.integers(1, total))
        grid = np.full((rows, -(-total // rows)), PADDING, np.int64)
        grid.reshape(-1)[:total] = np.arange(total)
        numbers = np.ascontiguousarray(grid.T if data.draw(st.booleans()) else grid[::-1]).reshape(-1)
    else:
        drawn = data.draw(st.lists(st.integers(-1, total - 1), min_size=1, max_size=80))
        numbers = np.array(drawn, np.int64)
    numbers = numbers.astype(data.draw(st.sampled_from([np.int32, np.int64])))
    recipe = boxes(TensorSpec("p", "float32", (len(numbers),)), numbers, numbering)
    assert recipe is not None
    tensors: dict[str, Array] = {
        name: np.arange(begin, begin + size, dtype=np.float32) + 1
        for name, begin, size in zip(numbering.names, numbering.starts, sizes, strict=False)
    }
    np.testing.assert_array_equal(evaluate(recipe, tensors.__getitem__), numbers + 1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("listed", [[45, 30, 14, PADDING], [5, 2, PADDING]])
def test_padding_is_not_taken_for_a_step_below_number_zero(listed: list[int], dtype: type[np.signedinteger]) -> None:
    """14 - 15 and 2 - 3 are -1, which is how padding is written."""
    numbering = Numbering.of([TensorSpec("t0", "float32", (1,)), TensorSpec("t1", "float32", (45,))])
    numbers = np.array(listed, dtype)
    recipe = boxes(TensorSpec("p", "float32", (len(listed),)), numbers, numbering)
    assert recipe is not None
    tensors: dict[str, Array] = {"t0": np.ones(1, np.float32), "t1": np.arange(2, 47, dtype=np.float32)}
    np.testing.assert_array_equal(evaluate(recipe, tensors.__getitem__), numbers + 1)


def test_a_box_is_looked_at_in_all_its_elements() -> None:
    """Columns that a glance leaves out go wrong in the second, the last, or a middle row."""
    rows, columns = 40, 64
    right = np.arange(rows * columns, dtype=np.int32).reshape(columns, rows).T
    numbering = Numbering.of([TensorSpec("t", "float32", (rows * columns,))])
    tensors: dict[str, Array] = {"t": np.arange(rows * columns, dtype=np.float32) + 1}
    for row in (1, rows // 2, rows - 1):
        for column in range(columns):
            numbers = right.copy()
            numbers[row, column] = 7
            recipe = boxes(TensorSpec("p", "float32", (numbers.size,)), numbers.reshape(-1), numbering)
            assert recipe is not None
            np.testing.assert_array_equal(evaluate(recipe, tensors.__getitem__), numbers.reshape(-1) + 1)


def test_a_weight_that_is_put_together_is_packed_from_its_parts() -> None:
    """The composed recipe packs a weight that is turned, cut and padded as the two recipes one after the other do."""
    model, specs = recurrence("LSTM", 12, 8, "forward")
    packed = learn(model, specs)
    assert packed is not None
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((12, 16), np.float32) for _ in range(2))
    half = Walk(0, (1, 16)), (16, 12)
    halves = [
        Piece(half[1], Walk(16 * 12 * k, (12, 1)), (Operand(name, half[0]),)) for k, name in enumerate(("a", "b"))
    ]
    definition = Recipe(specs["W"], tuple(halves))
    weight = np.concatenate([a.T, b.T])
    for block in (block for block in packed.blocks if block.weight == "W"):
        found = composed(block, definition, {"a": a.size, "b": b.size})
        assert found is not None
        assert found.sources == {"a", "b"}
        tensors = {"a": a.reshape(-1), "b": b.reshape(-1), "W": np.ascontiguousarray(weight).reshape(-1)}
        wanted = evaluate(block.recipe, tensors.__getitem__)
        assert evaluate(found, tensors.__getitem__).tobytes() == wanted.tobytes()


def test_an_engine_rolls_back_and_takes_partial_refits_of_packed_weights() -> None:
    live = Live("lstm")
    plan = onnx_refit.build(live.model)
    with onnx_refit.load(plan) as engine:
        first = engine.run(live.inputs)
        report = engine.refit(live.other(1))
        assert report.full_speed.done()
        second = engine.run(live.inputs)
        name = sorted(live.weights)[0]
        engine.refit({name: live.weights[name]}, partial=True)
        engine.rollback()
        assert all(engine.run(live.inputs)[key].tobytes() == second[key].tobytes() for key in second)
        engine.refit(live.weights)
        assert all(engine.run(live.inputs)[key].tobytes() == first[key].tobytes() for key in first)
