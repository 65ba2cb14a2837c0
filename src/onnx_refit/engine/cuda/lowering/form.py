"""A recurrent node of ONNX in one layout, for whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_refit.engine.cuda.lowering.operators import Tensor

DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
"""Activations where a node names none."""


@dataclass(frozen=True)
class Form:
    """What a recurrent node asks for, in one layout.

    Attributes:
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        x: [time, batch, inputs].
        w: [directions, gates * hidden, inputs].
        r: [directions, gates * hidden, hidden].
        b: [directions, 2 * gates * hidden] or None.
        lengths: steps of each batch element, or None for all.
        h: [directions, batch, hidden] to begin with, or None for zeros.
        c: the same for the cell, or None.
        p: [directions, 3 * hidden] peepholes, or None.
        hidden: the hidden size.
        reversed: for every direction whether it runs backwards.
        activations: for every direction its activations, by name.
        clip: bound of what goes into activations, or None.
        coupled: whether the forget gate is one minus the input gate.
        linear_before_reset: the GRU's form.
    """

    kind: str
    x: Tensor
    w: Tensor
    r: Tensor
    b: Tensor | None
    lengths: Tensor | None
    h: Tensor | None
    c: Tensor | None
    p: Tensor | None
    hidden: int
    reversed: tuple[bool, ...]
    activations: tuple[tuple[str, ...], ...]
    clip: float | None
    coupled: bool
    linear_before_reset: bool

    @property
    def common(self) -> bool:
        """Whether it is the form that libraries have."""
        usual = tuple(DEFAULTS[self.kind])
        plain = self.lengths is None and self.p is None and self.clip is None and not self.coupled
        form = self.kind != "GRU" or self.linear_before_reset
        return plain and form and all(names == usual for names in self.activations)
