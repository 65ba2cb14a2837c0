"""A checkpoint seen as the weights of a model, through a map of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.provenance.expression import Expression, Stored, dtype_of, evaluate, renamed, tensors_of
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.view import NamedView, ViewProblem, ViewProblemKind


class MappedView:
    """The weights of a model over a checkpoint in other names.

    Args:
        source: the checkpoint, or tensors that already have the model's names.
        names: the map.
    """

    def __init__(self, source: WeightSource, names: NameMap) -> None:
        self._source = source
        self._names = names
        entries, weights, shapes = names.entries, names.weights, names.shapes
        inner = source.problems if isinstance(source, NamedView) else {}
        held = source.specs.keys() | inner.keys()
        # A tied tensor goes by another of its names where the checkpoint has it under that one only.
        self._called = {
            name: other
            for name in (names.aliases.keys() | names.twins.keys()) - held
            for other in (*names.twins.get(name, ()), *names.aliases.get(name, ()))
            if other in held
        }
        self._parts = {
            name: tuple(dict.fromkeys(self._called.get(part, part) for part in tensors_of(e)))
            for name, e in entries.items()
        }
        shapes = {**shapes, **{other: shapes[name] for name, other in self._called.items()}}
        # Only names of one kind tell: a name of both kinds may mean different tensors, and then the map holds.
        known = shapes.keys() | names.ignored
        own, foreign = (held & weights.keys()) - known, (held & known) - weights.keys()
        # Where the map explains the lesser part of the weights, it was made with another model's checkpoint.
        foreign_map = len(names.unmatched) > len(entries) and not foreign and bool(held & weights.keys())
        self.own_names = len(own) > len(foreign) or foreign_map
        if self.own_names:
            self._parts = {name: (name,) for name in weights}
        self._entries = {} if self.own_names else entries
        specs: dict[str, TensorSpec] = {}
        problems: dict[str, ViewProblem] = {}
        for name, parts in self._parts.items():
            if not all(part in held for part in parts):
                continue
            problem = next((inner[part] for part in parts if part in inner), None) or self._misshapen(parts, shapes)
            if problem is not None:
                problems[name] = problem
            elif self.own_names:
                specs[name] = source.specs[name]
            else:
                dtype = dtype_of(entries[name], lambda part: source.specs[self._called.get(part, part)].dtype)
                specs[name] = TensorSpec(name, dtype, weights[name].shape)
        self._specs, self._problems = MappingProxyType(specs), MappingProxyType(problems)

    def _misshapen(self, parts: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> ViewProblem | None:
        if self.own_names:
            return None
        for part in parts:
            spec = self._source.specs[part]
            if spec.shape != shapes[part]:
                return ViewProblem(
                    ViewProblemKind.SHAPE,
                    f"the checkpoint's {spec} had the shape {list(shapes[part])} when the plan was built",
                )
        return None

    @property
    def description(self) -> str:
        """Where the tensors come from."""
        return self._source.description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Weight -> spec of every weight that the checkpoint gives."""
        return self._specs

    @property
    def origin(self) -> tuple[WeightSource, Mapping[str, Expression]]:
        """What the view is of, and how each weight is made of its tensors."""
        if self.own_names:
            return self._source, {name: Stored(name) for name in self._specs}
        called = self._called
        return self._source, {
            name: renamed(self._entries[name], lambda part: called.get(part, part)) for name in self._specs
        }

    @property
    def steady(self) -> bool:
        """Whether what ``dropped`` gives depends on no values, so that it is the same for other values."""
        specs, read = self._source.specs, self._names.shapes
        if self.own_names:
            return True
        return not any(name in specs for name in self._names.neutral) and not any(
            name in specs and other in specs and other not in read and not self._one_memory(name, other)
            for name, others in self._names.aliases.items()
            for other in others
        )

    def _one_memory(self, name: str, other: str) -> bool:
        return isinstance(self._source, ArraysSource) and self._source.same_memory(name, other)

    def read(self, name: str) -> Array:
        """One weight, computed from its tensors; a view of a checkpoint tensor where nothing has to move.

        Raises:
            WeightsError: the checkpoint does not give it, or a value does not survive a cast of the exporter.
        """
        if name not in self._specs:
            raise WeightsError(f"does not give the weight {name!r}", where=self.description)
        if self.own_names:
            return self._source.read(name)
        array = evaluate(self._entries[name], lambda part: self._source.read(self._called.get(part, part)))
        if array.shape != self._specs[name].shape:  # the map came out of a file, which may lie
            raise WeightsError(
                f"the map gives the weight {name!r} the shape {list(array.shape)}", where=self.description
            )
        return array

    def close(self) -> None:
        """Close the checkpoint."""
        self._source.close()

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a weight is made of, by their own names."""
        parts = self._parts.get(name, ())
        if isinstance(self._source, NamedView):
            return tuple(own for part in parts for own in self._source.checkpoint_names(part))
        return parts

    def expected(self, name: str) -> tuple[TensorSpec, ...]:
        """The checkpoint tensors that a weight would be made of and that are not there."""
        if self.own_names:
            return ()
        held, shapes = self._source.specs, self._names.shapes
        dtype = self._names.weights[name].dtype if name in self._names.weights else "float32"
        return tuple(TensorSpec(part, dtype, shapes[part]) for part in self._parts.get(name, ()) if part not in held)

    def why_missing(self, name: str) -> str:
        """Why no checkpoint gives a weight: at build time none of its tensors did."""
        if self.own_names or name not in self._names.unmatched:
            return ""
        return "no tensor of the checkpoint that the plan was built with gives it"

    def unused(self, wanted: Collection[str]) -> Mapping[str, TensorSpec]:
        """The checkpoint tensors that none of the wanted weights is made of and that the map does not know."""
        read = {part for name in wanted for part in self._parts.get(name, ())}
        if not self.own_names:
            read |= self._names.ignored
        if isinstance(self._source, NamedView):
            return self._source.unused(read)
        return {name: spec for name, spec in self._source.specs.items() if name not in read}

    @property
    def kept(self) -> frozenset[str]:
        """Weights that are no business of the checkpoint."""
        return frozenset() if self.own_names else self._names.fixed

    def dropped(self) -> Mapping[str, str]:
        """Tensors that an exporter may have left out for being all zeros or ones, and that no longer are."""
        found: dict[str, str] = {}
        if self.own_names:
            return found
        for name, neutral in self._names.neutral.items():
            spec = self._source.specs.get(name)
            if spec is None or bool((self._source.read(name) == neutral).all()):
                continue
            found[name] = (
                f"it was all {'ones' if neutral else 'zeros'} when the plan was built, so the model may have been "
                "exported without it, and it no longer is: export the model with trained weights"
            )
        specs, read = self._source.specs, self._names.shapes
        for name, others in self._names.aliases.items():
            for other in others:
                if other in read or name not in specs or other not in specs or self._one_memory(name, other):
                    continue
                if not same_bits(self._source.read(name), self._source.read(other)):
                    found[other] = (
                        f"it was one tensor with {name} when the plan was built, and the model has one weight for "
                        "both, but now they differ: untie them in the model and export it again"
                    )
        return found

    @property
    def problems(self) -> Mapping[str, ViewProblem]:
        """Weight -> why the checkpoint's tensors cannot be taken for it."""
        return self._problems
