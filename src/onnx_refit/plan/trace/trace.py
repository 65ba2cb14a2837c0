"""Optimise a graph whose weights are inputs, and explain the weights of the result."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_refit.model.graph import Names, all_graphs
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.plan.trace.canonical import TensorKey, skeleton
from onnx_refit.plan.trace.codes import FOREIGN, MULTIPLIERS, Code, RandomValues
from onnx_refit.plan.trace.exchange import Optimise, Optimised, Values, run, with_initializers
from onnx_refit.plan.trace.recipes import Recipe, agrees, bits, whole
from onnx_refit.plan.trace.recognise import Numbering, quick, thorough
from onnx_refit.plan.trace.related import Related
from onnx_refit.plan.trace.unseen import unseen
from onnx_refit.tensors import Array, TensorSpec, is_floating, numpy_dtype, spec_of, value_info_of

_ENOUGH = 64  # elements of random values that tell any two weights apart, 8-bit ones too
_WIDENED = {("float16", "float32"), ("bfloat16", "float32")}
_SAMPLES = 16  # elements looked at before all


@dataclass(frozen=True)
class Traced:
    """An optimised graph whose weights are inputs again.

    Attributes:
        model: the graph: the inputs it had, less the weights, and one input a weight of the result.
        recipes: weight of the result -> how it is put together from the weights given.
        decisions: optimisations left out, and why.
    """

    model: onnx.ModelProto
    recipes: Mapping[str, Recipe]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class _Attempt:
    """One try: what came out, what of it is explained, what is not (and whether even its nodes changed with values)."""

    model: onnx.ModelProto
    recipes: Mapping[TensorKey, Recipe]
    constants: Mapping[TensorKey, Array]
    unexplained: tuple[str, ...]
    unstable: bool = False

    @property
    def faults(self) -> tuple[bool, int]:
        return self.unstable, len(self.unexplained)


class Tracer:
    """Explains what one optimiser does to one graph.

    Args:
        model: the graph; the weights are graph inputs of it.
        weights: dtype and static shape of each.
        optimise: the optimiser.
        related: weights that are computed from others, which the optimiser looks at.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: Sequence[TensorSpec],
        optimise: Optimise,
        related: Related | None = None,
    ) -> None:
        self._original = model
        self._all = tuple(weights)
        self._optimise = optimise
        self._unseen = unseen(model, (spec.name for spec in weights))
        self._weights = tuple(
            spec for spec in weights if Code.supports(spec.dtype) and spec.size and spec.name not in self._unseen
        )
        self._left = tuple(spec for spec in weights if spec not in self._weights)
        self._model = with_initializers(model, self._weights)
        self._related = related
        self._computed = tuple(s for s in self._weights if related is not None and s.name in related.names)
        by_dtype: dict[str, list[TensorSpec]] = {}
        for spec in self._weights:
            if spec not in self._computed:
                by_dtype.setdefault(spec.dtype, []).append(spec)
        self._numberings = {dtype: Numbering.of(specs) for dtype, specs in by_dtype.items()}
        self._codes = {dtype: self._code(dtype, model) for dtype in by_dtype}
        self._starts = {
            name: start
            for numbering in self._numberings.values()
            for name, start in zip(numbering.names, numbering.starts, strict=False)
        }

    def _code(self, dtype: str, model: onnx.ModelProto) -> Code:
        """A code whose values are none of the graph's own scalars, which optimisers merge with equal ones."""
        total = self._numberings[dtype].total
        scalars = [
            onnx.numpy_helper.to_array(tensor).reshape(-1)
            for graph in all_graphs(model.graph)
            for tensor in graph.initializer
            if np.prod(tensor.dims, dtype=np.int64) <= 64
        ]
        codes = [Code(dtype, total, multiplier) for multiplier in MULTIPLIERS]
        wanted = codes[0].encode(0, 1, 0).dtype
        present = [array for array in scalars if array.dtype == wanted and array.size]
        for code in codes:
            if code.digits > 1 or not any((code.decode([array]) >= 0).any() for array in present):
                return code
        return codes[0]

    def trace(self, candidates: Sequence[Sequence[str]] = ()) -> Traced:
        """Optimise and explain.

        Args:
            candidates: groups of names of the optimiser's parts, the likeliest culprits first. Where something stays
                unexplained, groups are left out until everything is explained, and then let in again name by name.
        """
        decisions = [
            Decision(
                name,
                "let the optimiser see it",
                Verdict.REJECTED,
                f"{operator} reads only weights, and how much it gives depends on their values",
            )
            for name, operator in self._unseen.items()
        ]
        with tempfile.TemporaryDirectory(prefix="onnx-refit-") as folder:
            place = Path(folder)
            attempt = self._attempt((), place)
            if attempt.faults != (False, 0):
                what = ", ".join(attempt.unexplained[:3]) or "the nodes of the result"
                found = self._without_culprits(candidates, place)
                if found is None:
                    reason = f"{what} depend on the values of weights in a way that no recipe gives"
                    decision = Decision("the whole graph", "optimise", Verdict.REJECTED, reason)
                    recipes = {spec.name: whole(spec, spec.name) for spec in self._all}
                    return Traced(self._original, recipes, (*decisions, decision))
                culprits, attempt = found
                reason = f"with it, {what} would depend on the values of weights in a way that no recipe gives"
                decisions += [Decision(name, "run this optimisation", Verdict.REJECTED, reason) for name in culprits]
            return self._finish(attempt, tuple(decisions))

    def _without_culprits(
        self, candidates: Sequence[Sequence[str]], folder: Path
    ) -> tuple[tuple[str, ...], _Attempt] | None:
        """The fewest of the optimisations left out with which everything is explained, each being needed."""
        disabled: tuple[str, ...] = ()
        for group in candidates:
            disabled += tuple(group)
            attempt = self._attempt(disabled, folder)
            if attempt.faults == (False, 0):
                break
        else:
            return None
        for name in disabled:
            fewer = tuple(other for other in disabled if other != name)
            tried = self._attempt(fewer, folder)
            if tried.faults == (False, 0):
                disabled, attempt = fewer, tried
        return disabled, attempt

    def _attempt(self, disabled: Sequence[str], parent: Path) -> _Attempt:
        folder = Path(tempfile.mkdtemp(dir=parent))
        runs = max((code.digits for code in self._codes.values()), default=1)
        draw = RandomValues()

        def random(spec: TensorSpec, first: int, count: int) -> Array:
            apart = None if is_floating(spec.dtype) else self._values(spec, first, count, 0)
            return draw(spec.dtype, count, unlike=apart)

        coded = [self._coded(0, disabled, folder)]
        proof = self._run(random, disabled, folder / "random")
        bones = skeleton(proof.model)
        if skeleton(coded[0].model) != bones:
            shutil.rmtree(folder)
            return _Attempt(proof.model, {}, {}, (), unstable=True)
        constants = {key: v.copy() for key, v in proof.tensors.items() if _equal(v, coded[0].tensors[key])}
        waiting = [key for key in proof.tensors if key not in constants]
        recipes = self._explained(waiting, coded, proof)
        if runs > 1 and len(recipes) < len(waiting):
            coded += [self._coded(digit, disabled, folder) for digit in range(1, runs)]
            if any(skeleton(each.model) != bones for each in coded):
                shutil.rmtree(folder)
                return _Attempt(proof.model, {}, {}, (), unstable=True)
            recipes.update(self._explained([key for key in waiting if key not in recipes], coded, proof))
        unexplained = [
            f"{key[1]} ({proof.tensors[key].dtype}{list(proof.tensors[key].shape)})"
            for key in waiting
            if key not in recipes
        ]
        shutil.rmtree(folder)
        return _Attempt(proof.model, recipes, constants, tuple(unexplained))

    def _coded(self, digit: int, disabled: Sequence[str], folder: Path) -> Optimised:
        def coded(spec: TensorSpec, first: int, count: int) -> Array:
            return self._values(spec, first, count, digit)

        return self._run(coded, disabled, folder / f"coded{digit}")

    def _run(self, values: Values, disabled: Sequence[str], folder: Path) -> Optimised:
        fixed: dict[str, Array] = {}
        if self._related is not None:
            read = {s.name: values(s, 0, s.size).reshape(s.static_shape) for s in self._related.reads}
            made = {**read, **self._related.compute(read)}
            fixed = {name: np.ascontiguousarray(array).reshape(-1) for name, array in made.items()}

        def given(spec: TensorSpec, first: int, count: int) -> Array:
            known = fixed.get(spec.name)
            return values(spec, first, count) if known is None else known[first : first + count]

        return run(self._optimise, self._model, self._weights, given, disabled, folder)

    def _values(self, spec: TensorSpec, first: int, count: int, digit: int) -> Array:
        return self._codes[spec.dtype].encode(self._starts[spec.name] + first, count, digit)

    def _explained(
        self, keys: Sequence[TensorKey], coded: Sequence[Optimised], proof: Optimised
    ) -> dict[TensorKey, Recipe]:
        found = ((key, self._explain(key, coded, proof)) for key in keys)
        return {key: recipe for key, recipe in found if recipe is not None}

    def _explain(self, key: TensorKey, coded: Sequence[Optimised], proof: Optimised) -> Recipe | None:
        """The recipe of one tensor, proved; None where there is none, or none from these runs."""
        random = proof.tensors[key]
        values = [each.tensors[key] for each in coded]
        spec = spec_of(key[1], random)

        def proved(recipe: Recipe | None) -> bool:
            return (
                recipe is not None
                and all(agrees(recipe, run.weights.__getitem__, v) for run, v in zip(coded, values, strict=True))
                and agrees(recipe, proof.weights.__getitem__, random)
            )

        for one in self._computed:
            copy = whole(spec, one.name)
            if (one.dtype, one.size) == (spec.dtype, spec.size) and proved(copy):
                return copy
        # A tensor's own dtype first: codes of another one are only ever read where the optimiser cast a weight.
        for dtype, code in sorted(self._codes.items(), key=lambda item: item[0] != spec.dtype):
            if code.digits > len(values):
                recipe = next(filter(proved, self._copies(spec, dtype, values[0])), None)
                if recipe is not None:
                    return recipe
                continue
            flat = [_as_dtype(value.reshape(-1), code) for value in values[: code.digits]]
            digits = [each for each in flat if each is not None]
            if len(digits) < len(flat):
                continue
            raws = [bits(digit) for digit in digits]

            def lookup(at: int, code: Code = code, raws: list[Array] = raws) -> int:
                return code.number([int(raw[at]) for raw in raws])

            if any(lookup(at) == FOREIGN for at in range(0, spec.size, max(1, spec.size // _SAMPLES))):
                continue
            numbering = self._numberings[dtype]
            recipe = quick(spec, lookup, numbering)
            if proved(recipe):
                return recipe
            recipe = thorough(spec, code.decode(digits), numbering)
            if proved(recipe):
                return recipe
        return None

    def _copies(self, spec: TensorSpec, dtype: str, coded: Array) -> Iterator[Recipe]:
        """A tensor as a mere copy of a weight, guessed from the first digit of its elements' numbers.

        Only where the random run alone proves it: all elements of a small tensor could agree by chance.
        """
        if spec.size < _ENOUGH or (dtype != spec.dtype and (dtype, spec.dtype) not in _WIDENED):
            return
        start = coded.reshape(-1)[:_ENOUGH]
        for weight in self._weights:
            same = weight.dtype == dtype and weight.size == spec.size and weight.name in self._starts
            if same and _equal(self._values(weight, 0, _ENOUGH, 0).astype(start.dtype), start):
                yield whole(spec, weight.name)

    def _finish(self, attempt: _Attempt, decisions: tuple[Decision, ...]) -> Traced:
        model = onnx.ModelProto()
        model.CopyFrom(attempt.model)
        names = Names.of(model.graph)
        recipes: dict[str, Recipe] = {}
        for number, graph in enumerate(all_graphs(model.graph)):
            kept, renamed = [], {}
            for tensor in graph.initializer:
                recipe = attempt.recipes.get((number, tensor.name))
                if recipe is None:
                    array = np.ascontiguousarray(attempt.constants[number, tensor.name])
                    tensor.CopyFrom(onnx.numpy_helper.from_array(array.reshape(tuple(tensor.dims)), tensor.name))
                    kept.append(tensor)
                    continue
                fresh = names.fresh("+".join(sorted(recipe.sources)[:2]))
                renamed[tensor.name] = fresh
                spec = TensorSpec(fresh, recipe.spec.dtype, recipe.spec.shape)
                recipes[fresh] = Recipe(spec, recipe.pieces, recipe.gathers)
            del graph.initializer[:]
            graph.initializer.extend(kept)
            _rename(graph, renamed)
        model.graph.input.extend(value_info_of(recipe.spec) for recipe in recipes.values())
        recipes.update((spec.name, whole(spec, spec.name)) for spec in self._left)
        return Traced(model, recipes, decisions)


def _rename(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename what the graph and those in it read; an output that is such a value becomes a copy of it."""
    for value in graph.output:
        if value.name in renamed:
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [value.name]))
    for inner in all_graphs(graph):
        for node in inner.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]


def _equal(first: Array, second: Array) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype == object:
        return bool((first == second).all())
    a, b = first.reshape(-1), second.reshape(-1)
    if a.size > 64 and not np.array_equal(bits(a[:64]), bits(b[:64])):
        return False
    return np.array_equal(bits(a), bits(b))


def _as_dtype(flat: Array, code: Code) -> Array | None:
    """The values as the code's dtype, where nothing is lost (a weight that the optimiser cast)."""
    wanted = numpy_dtype(code.dtype)
    if flat.dtype == wanted:
        return flat
    if flat.dtype.kind not in "fV" or wanted.kind not in "fV":
        return None

    def lossless(values: Array) -> Array | None:
        with np.errstate(over="ignore"):
            cast = values.astype(wanted)
        return cast if np.array_equal(bits(cast.astype(flat.dtype)), bits(values)) else None

    return None if lossless(flat[:_ENOUGH]) is None else lossless(flat)
