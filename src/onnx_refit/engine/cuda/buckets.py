"""Rounding dynamic dimensions up, so that a few recorded graphs serve many shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_refit.errors import EngineError
from onnx_refit.tensors import TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fitted:
    """The shapes that one request runs with.

    Attributes:
        shapes: input name -> shape, rounded up.
        sizes: dimension name -> the request's own size, for those that were rounded up.
    """

    shapes: Mapping[str, Shape]
    sizes: Mapping[str, int]

    @property
    def padded(self) -> bool:
        """Whether anything was rounded up."""
        return bool(self.sizes)

    @property
    def key(self) -> tuple[tuple[str, Shape], ...]:
        """What identifies a recorded graph."""
        return tuple(sorted(self.shapes.items()))


class Buckets:
    """Which sizes are rounded up to which.

    Args:
        inputs: the model's inputs.
        outputs: the model's outputs; a rounded dimension must be named in them, or nobody could cut them again.
        sizes: dimension name -> sizes to round up to; larger ones run as they are.

    Raises:
        EngineError: a name that no input has, or an output whose dimensions are unnamed.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], sizes: Mapping[str, Sequence[int]]
    ) -> None:
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = {spec.name: spec for spec in outputs}
        named = {dim for spec in inputs for dim in spec.shape or () if isinstance(dim, str)}
        for name, steps in sizes.items():
            if name not in named:
                known = ", ".join(sorted(named)) or "none"
                raise EngineError(f"no input has a dimension {name!r}", hint=f"The named ones are {known}")
            if not steps or any(step < 1 for step in steps):
                raise EngineError(f"the sizes to round up to must be positive, not {list(steps)}", where=name)
        if sizes:
            for spec in outputs:
                if spec.shape is None or None in spec.shape:
                    raise EngineError("its dimensions have no names, so padding could not be cut off", where=spec.name)
        self._sizes = {name: tuple(sorted(steps)) for name, steps in sizes.items()}

    def fit(self, shapes: Mapping[str, Shape], *, exact: bool = False) -> Fitted:
        """The shapes to run with; ``exact`` leaves them as they are."""
        rounded: dict[str, int] = {}
        fitted: dict[str, Shape] = {}
        for name, shape in shapes.items():
            dims = list(shape)
            for axis, dim in enumerate(self._inputs[name].shape or ()):
                if isinstance(dim, str) and not exact:
                    step = next((step for step in self._sizes.get(dim, ()) if step >= shape[axis]), shape[axis])
                    if step != shape[axis]:
                        rounded[dim] = shape[axis]
                    dims[axis] = step
            fitted[name] = tuple(dims)
        return Fitted(fitted, rounded)

    def crop(self, name: str, fitted: Fitted) -> tuple[slice, ...]:
        """What of an output belongs to the request."""
        dims = self._outputs[name].shape or ()
        return tuple(
            slice(fitted.sizes[dim]) if isinstance(dim, str) and dim in fitted.sizes else slice(None) for dim in dims
        )
