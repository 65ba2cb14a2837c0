"""Optimisation profiles: the smallest, usual and largest shape of every dynamic input, given or inferred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx_refit.errors import EngineError
from onnx_refit.tensors import TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of one dimension."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise EngineError(f"a dimension's sizes must ascend from 0, not {self.min}:{self.opt}:{self.max}")

    @classmethod
    def parse(cls, text: str) -> Range:
        """``"1:50:400"`` or ``"8"`` (always 8); EngineError for anything else."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise EngineError(f"{text!r} is no range of sizes", hint="Write MIN:OPT:MAX, for example 1:50:400")
        sizes = [int(part) for part in parts]
        return cls(*(sizes * 3 if len(sizes) == 1 else sizes))


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, usual and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise EngineError(f"the shapes {self.min}, {self.opt} and {self.max} are not of one rank")
        for sizes in zip(self.min, self.opt, self.max, strict=True):
            Range(*sizes)

    @classmethod
    def parse(cls, text: str) -> ShapeRange:
        """``"1x3x224x224:8x3x224x224:32x3x224x224"``; EngineError for anything else."""
        shapes = [part.split("x") for part in text.split(":")]
        if len(shapes) not in (1, 3) or not all(size.isdecimal() for shape in shapes for size in shape):
            raise EngineError(f"{text!r} is no range of shapes", hint="Write MIN:OPT:MAX, for example 1x16:8x16:64x16")
        parsed = [tuple(int(size) for size in shape) for shape in shapes]
        return cls(*(parsed * 3 if len(parsed) == 1 else parsed))


@dataclass(frozen=True)
class Profile:
    """The profile of one model.

    Attributes:
        shapes: input name -> shapes, for every dynamic input.
        inferred: ``input[axis]`` of the dimensions whose sizes nobody gave.
    """

    shapes: Mapping[str, ShapeRange]
    inferred: tuple[str, ...]


def plan_profile(
    inputs: Iterable[TensorSpec],
    shapes: Mapping[str, ShapeRange],
    dimensions: Mapping[str, Range],
    fallback: Range,
) -> Profile:
    """The profile for these inputs.

    Args:
        inputs: the model's inputs.
        shapes: what the caller gave by input.
        dimensions: what the caller gave by dimension name; the same name means the same size in every input.
        fallback: what is taken for the rest.

    Raises:
        EngineError: a given shape does not fit its input, an input is unknown or has no known rank.
    """
    specs = {spec.name: spec for spec in inputs}
    for name in shapes:
        if name not in specs:
            raise EngineError(f"there is no input {name!r}", hint=f"The inputs are {', '.join(specs)}")
    known = {dim for spec in specs.values() for dim in spec.shape or () if isinstance(dim, str)}
    for name in dimensions:
        if name not in known:
            raise EngineError(
                f"no input has a dimension {name!r}", hint=f"The dynamic dimensions are {', '.join(sorted(known))}"
            )
    made: dict[str, ShapeRange] = {}
    inferred: list[str] = []
    for name, spec in specs.items():
        if spec.is_static:
            continue
        if spec.shape is None:
            raise EngineError("the rank of the input is unknown", where=name)
        if name in shapes:
            made[name] = _fitting(spec, shapes[name])
            continue
        ranges = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                ranges.append(Range(dim, dim, dim))
            elif dim is not None and dim in dimensions:
                ranges.append(dimensions[dim])
            else:
                ranges.append(fallback)
                inferred.append(f"{name}[{axis}]")
        made[name] = ShapeRange(
            tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges)
        )
    return Profile(made, tuple(inferred))


def _fitting(spec: TensorSpec, given: ShapeRange) -> ShapeRange:
    dims = spec.shape or ()
    for shape in (given.min, given.opt, given.max):
        fits = len(shape) == len(dims) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
        )
        if not fits:
            raise EngineError(f"the shape {list(shape)} does not fit the input {spec}", where=spec.name)
    return given
