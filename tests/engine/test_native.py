"""The native code as a part that may be missing: found, refused, done without; and what its build hook does."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import ml_dtypes
import numpy as np
import onnx
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime import backend as backends
from onnx_refit.errors import RefitRejectedError
from onnx_refit.moves.library import FILE, OFF, Absent, Library, load
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.refit import inspection, packet
from onnx_refit.refit.inspection import Inspection

from .zoo import ZOO, model, n, weight

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/onnx_refit/moves/moves.c"
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(OFF, raising=False)
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refitted(threads: int) -> tuple[np.ndarray, Decision]:
    rng = np.random.default_rng(0)
    made = model(
        [n("MatMul", "x w", "h"), n("Add", "h b", "y")],
        [("x", ["M", 96])],
        [("y", None)],
        [weight(rng, "w", 96, 64), weight(rng, "b", 64)],
    )
    plan = onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=onnx_refit.EngineOptions(threads)))
    with onnx_refit.load(plan) as engine:
        engine.refit({"w": np.full((96, 64), 2, np.float32), "b": np.arange(64, dtype=np.float32)})
        (decision,) = [d for d in engine.decisions if d.action == "move weights by native code"]
        return engine.run({"x": np.ones((2, 96), np.float32)})["y"], decision


@compiler
def test_what_is_installed_is_used() -> None:
    answer, decision = refitted(1)
    assert decision.verdict is Verdict.ACCEPTED
    np.testing.assert_array_equal(answer, np.broadcast_to(192 + np.arange(64, dtype=np.float32), (2, 64)))


def test_the_environment_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "1")
    answer, decision = refitted(1)
    assert decision.verdict is Verdict.REJECTED
    assert OFF in decision.reason
    np.testing.assert_array_equal(answer, np.broadcast_to(192 + np.arange(64, dtype=np.float32), (2, 64)))


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_missing_or_broken_file_is_done_without(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    found = load(tmp_path)
    assert isinstance(found, Absent)
    assert ("no C compiler" in found.reason) == (content is None)


@compiler
def test_a_file_of_another_version_is_refused(hook: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "moves.c"
    source.write_text(SOURCE.read_text().replace("int64_t lines;", "int64_t lines, more;"))
    for header in SOURCE.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    assert hook.compiled(source, tmp_path / FILE) == ""
    found = load(tmp_path)
    assert isinstance(found, Absent)
    assert "install the package again" in found.reason


@compiler
def test_the_hook_compiles_without_a_warning_and_leaves_nothing_else(hook: ModuleType, tmp_path: Path) -> None:
    assert hook.compiled(SOURCE, tmp_path / FILE) == ""
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert isinstance(load(tmp_path), Library)


@compiler
def test_what_does_not_compile_is_said(hook: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "moves.c"
    source.write_text("int broken(")
    assert "error" in hook.compiled(source, tmp_path / FILE)
    assert not (tmp_path / FILE).exists()


@compiler
@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_that_c_leaves_undefined_is_done(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    """As here, and as on a processor without wide registers."""
    flags = "-fsanitize=undefined -fsanitize-undefined-trap-on-error" + " -DONNX_REFIT_NARROW" * narrow
    monkeypatch.setenv("CC", f"cc {flags}")
    problem = hook.compiled(SOURCE, tmp_path / FILE)
    if problem:
        pytest.skip(f"the compiler has no such check: {problem}")
    script = (
        "import pathlib, sys\n"
        "from onnx_refit.moves.library import Library, load\n"
        "import tests.engine.test_moving as tests\n"
        "tests.found = load(pathlib.Path(sys.argv[1]))\n"
        "assert isinstance(tests.found, Library)\n"
        "for by in range(8):\n"
        "    for dtype in ('float32', 'float16', 'float64'):\n"
        "        for steps in ((40, 1), (1, 60), (2, 120)):\n"
        "            tests.test_sources_that_begin_at_any_byte(by, dtype, steps, by % 2 == 0)\n"
        "tests.test_any_order_of_axes()\n"
        "tests.test_products_are_those_of_numpy()\n"
        "tests.test_what_is_not_finite_is_seen_wherever_it_is()\n"
        "for kept in (False, True):\n"
        "    tests.test_what_is_not_finite_is_seen_while_it_is_moved(block=16, turned=True, kept=kept)\n"
        "import tests.engine.test_roll as roll\n"
        "roll.found = tests.found\n"
        "roll.test_it_is_native_where_it_was_compiled()\n"
        "roll.test_both_ways_say_the_same()\n"
        "roll.test_joining_and_sampling_read_what_numpy_reads()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a trap ends the process


@pytest.mark.parametrize("command", ["cc 'unfinished", "no-such-compiler -O3"])
def test_a_command_that_cannot_be_run_is_said(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CC", command)
    assert hook.compiled(SOURCE, tmp_path / FILE)
    assert list(tmp_path.iterdir()) == []


@compiler
def test_a_folder_that_cannot_be_written_is_said(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hook.tempfile, "mkdtemp", refuse)
    assert "Permission denied" in hook.compiled(SOURCE, tmp_path / FILE)


def test_without_a_compiler_there_is_a_reason(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in hook.compiled(SOURCE, tmp_path / FILE)


def test_weights_that_native_code_moves_but_cannot_look_at_are_kept() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (96, 128)).astype(ml_dtypes.int4)
    made = model(
        [n("Transpose", "q", "t", perm=[1, 0]), n("DequantizeLinear", "t s", "w"), n("MatMul", "x w", "y")],
        [("x", ["M", 128])],
        [("y", None)],
        [onnx.numpy_helper.from_array(values, "q"), onnx.numpy_helper.from_array(np.array(1, np.float32), "s")],
        opset=21,
    )
    made.ir_version = 10
    compilation = compile_model(made, CompileOptions(refittable=("q",)))
    backend = backends.create(compilation.compiled)
    kept = {"q": np.zeros_like(values)}
    looks = Inspection({"q": values}, kept, look=True)
    backend.derive({**compilation.weights, "q": values}, inspector=looks)
    assert looks.finish()
    assert kept["q"].tobytes() == values.tobytes()
    backend.close()


def masked() -> onnx.ModelProto:
    """A weight that another one scales, and that is read as it is too."""
    rng = np.random.default_rng(0)
    nodes = [n("Mul", "w s", "m"), n("MatMul", "x m", "y"), n("MatMul", "x w", "z")]
    return model(
        nodes, [("x", ["M", 30])], [("y", None), ("z", None)], [weight(rng, "w", 30, 16), weight(rng, "s", 30, 1)]
    )


@pytest.mark.parametrize("name", [*ZOO, "masked"])
@pytest.mark.parametrize("partial", [False, True])
def test_each_weight_of_each_model_is_looked_at_and_kept(
    name: str, partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of any size treated like large ones, which the engine looks at and copies while it moves them."""
    monkeypatch.setattr(inspection, "_SMALL", 1)
    monkeypatch.setattr(packet, "SMALL", 0)
    rng = np.random.default_rng(0)
    made = masked() if name == "masked" else ZOO[name]()[0]
    plan = onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=onnx_refit.EngineOptions(1)))
    with onnx_refit.load(plan) as engine:
        first = engine.weights()
        values = {weight: np.array(first.read(weight)) for weight in engine.refittable}
        for bad in [weight for weight, array in values.items() if array.dtype.kind == "f"]:
            new = {bad: values[bad] / 2} if partial else {**values, bad: values[bad] / 2}
            engine.refit(new, partial=partial)
            now = engine.weights()
            assert all(now.read(weight).tobytes() == array.tobytes() for weight, array in new.items()), bad
            wrong = {weight: array.copy() for weight, array in new.items()}
            wrong[bad].reshape(-1)[rng.integers(wrong[bad].size)] = rng.choice([np.nan, np.inf])
            with pytest.raises(RefitRejectedError):
                engine.refit(wrong, partial=partial)


def test_both_ways_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    native, _ = refitted(2)
    monkeypatch.setattr(backends, "load_moves", lambda: Absent("the test does without"))
    python, decision = refitted(2)
    assert decision.verdict is Verdict.REJECTED
    assert native.tobytes() == python.tobytes()
