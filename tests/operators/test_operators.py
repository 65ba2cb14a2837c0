"""The page of operators, and what it is made of."""

from __future__ import annotations

import pytest

from tests.operators.page import PAGE, found, render, versions
from tests.operators.survey import Outcome

# Compared and refitted cases of the versions pinned; more are welcome.
_FEWEST = {Outcome.REFITTED: 800, Outcome.NOTHING: 600}


def test_the_page_is_there() -> None:
    page = PAGE.read_text()
    for title in ("## Refitted: ", "## Run, with nothing to refit: ", "## Not supported: ", "## Not looked at: "):
        assert page.count(title) == 1
    assert "| Conv | X, W |" in page


def test_an_operator_of_each_kind() -> None:
    findings = found(["Gemm", "NonZero", "SequenceInsert"])
    assert findings["Gemm"].outcomes.keys() == {Outcome.REFITTED}
    assert findings["Gemm"].places == {0, 1, 2}
    assert findings["NonZero"].outcomes.keys() == {Outcome.NOTHING}
    assert findings["SequenceInsert"].outcomes.keys() == {Outcome.NO_TENSORS}
    page = render(findings)
    assert "| Gemm | A, B, C | 11 |  |" in page
    assert "| SequenceInsert | 2: sequences and optionals are no tensors |" in page


@pytest.mark.slow
def test_the_page_says_what_there_is() -> None:
    findings = found()
    assert not [op for op, finding in findings.items() if Outcome.DIFFERS in finding.outcomes]
    for outcome, fewest in _FEWEST.items():
        assert sum(len(finding.outcomes.get(outcome, ())) for finding in findings.values()) > fewest
    page = PAGE.read_text()
    if f"with {versions()};" not in page:
        pytest.skip("the page was made with other versions of onnx or onnxruntime")
    assert page == render(findings), "run: make operators"
