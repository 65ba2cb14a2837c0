"""Step three of the sample: fake weights, then the right ones, into a running engine; the answer tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.refit.live import Engine
from onnx_refit.samples.bidaf.answering import Say, answer
from onnx_refit.samples.bidaf.convert import REFITTED
from onnx_refit.samples.bidaf.prepare import ANSWER, CONTEXT, QUESTION
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class Outcome:
    """What the engine answered.

    Attributes:
        fake: the answer with the fake weights.
        right: the answer with the right weights.
        expected: the right answer.
    """

    fake: str
    right: str
    expected: str

    @property
    def passed(self) -> bool:
        """Whether the right weights gave the right answer and the fake ones another."""
        return self.right.lower() == self.expected and self.fake.lower() != self.expected

    def explanation(self) -> str:
        """What was expected and what came, one line."""
        return (
            f"expected: not {self.expected!r} with the fake weights and {self.expected!r} with the right ones; "
            f"got: {self.fake!r} with the fake weights and {self.right!r} with the right ones"
        )


def refit_and_infer(engine: Engine, right: Mapping[str, Array], say: Say, *, everything: bool = False) -> Outcome:
    """Refit with ones, ask, refit with the right weights, ask again.

    Args:
        engine: a loaded BiDAF engine; afterwards it holds the right weights.
        right: the right weights, at least the two that the sample names.
        say: takes the lines of the sample; ``Passed`` is the last one if all is well.
        everything: refit all weights, not only the two that NVIDIA's sample names.

    Raises:
        WeightsError: the right weights lack a tensor, or the engine has no such weights.
        RefitError: a refit was refused.
    """
    names = tuple(engine.refittable) if everything else REFITTED
    for name in names:
        if name not in engine.refittable or name not in right:
            where = "engine" if name not in engine.refittable else "model"
            raise WeightsError(f"the {where} has no weights {name}", hint="Use a model of the BiDAF sample")
    fakes = {name: np.ones_like(right[name]) for name in names}
    answers = []
    for weights in (fakes, {name: right[name] for name in names}):
        say("Refitting engine...")
        engine.refit(weights, partial=not everything)
        say("Doing inference...")
        answers.append(answer(engine, CONTEXT, QUESTION).text)
    outcome = Outcome(answers[0], answers[1], ANSWER)
    if outcome.passed:
        say("Passed")
    return outcome
