from dataclasses import dataclass
from pathlib import Path

import pytest
from onnx import ModelProto

import onnx_refit
from onnx_refit.plan.plan import Plan
from onnx_refit.samples.bidaf import bundle
from onnx_refit.samples.bidaf.build import get_plan
from onnx_refit.samples.bidaf.demo import dev_questions, write_original
from onnx_refit.samples.bidaf.prepare import prepare_bidaf


@dataclass(frozen=True)
class Sample:
    """The bundled model, prepared and built once for all tests; tests must not change these files."""

    directory: Path
    original: Path
    modified: Path
    plan_path: Path
    prepare_lines: tuple[str, ...]
    build_lines: tuple[str, ...]
    plan: Plan


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Sample:
    directory = tmp_path_factory.mktemp("bidaf")
    prepare_lines: list[str] = []
    build_lines: list[str] = []
    original = write_original(directory)
    modified = prepare_bidaf(original, directory / "bidaf-modified.onnx", prepare_lines.append).model
    plan = get_plan(modified, directory / "bidaf.plan", build_lines.append)
    return Sample(
        directory, original, modified, directory / "bidaf.plan", tuple(prepare_lines), tuple(build_lines), plan
    )


@pytest.fixture(scope="session")
def shared_engine(sample):
    with onnx_refit.load(sample.plan) as engine:
        yield engine


@pytest.fixture
def engine(sample):
    """An engine of its own, for tests that refit."""
    with onnx_refit.load(sample.plan) as engine:
        yield engine


@pytest.fixture(scope="session")
def original_model() -> ModelProto:
    return bundle.bundled_model()


@pytest.fixture(scope="session")
def questions():
    return dev_questions(40)
