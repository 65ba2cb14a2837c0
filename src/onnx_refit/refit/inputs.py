"""Checking and preparing the inputs of an inference, before the backend sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_refit.errors import InputError
from onnx_refit.model.vocabulary import VocabularyMap
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype


class InputChecker:
    """Turns what a caller gives into what the engine takes, or says exactly what is wrong.

    An input that a vocabulary was taken out of may be given under the name it had in the user's model (strings, mapped
    here on the host) or under the engine's own name (the mapped integers).
    """

    def __init__(self, inputs: Sequence[TensorSpec], preprocessors: Sequence[VocabularyMap] = ()) -> None:
        self._specs = {spec.name: spec for spec in inputs}
        self._dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in inputs}
        # In graph order, so that a map which reads another's output finds it.
        self._maps = tuple(preprocessors)
        # Name, dtype and shape of the last inputs that were right: most requests look like the one before, and after a
        # large model has run, when no code of this is in the processor's caches, the whole check takes 50 to 100 us.
        self._last: tuple[tuple[str, np.dtype[np.generic], tuple[int, ...]], ...] | None = None

    def __call__(self, given: Mapping[str, object]) -> dict[str, Array]:
        """Check and map all inputs.

        Args:
            given: input name -> array (or anything ``numpy.asarray`` takes).

        Returns:
            Input name -> C-contiguous array of the declared dtype and a fitting shape.

        Raises:
            InputError: an input is missing, unknown, of another dtype, of a shape that does not fit, or two inputs
                disagree about a named dimension.
        """
        if self._last is not None and type(given) is dict and len(given) == len(self._last):
            same: dict[str, Array] = {}
            for name, dtype, shape in self._last:
                array = given.get(name)
                if type(array) is not np.ndarray or array.dtype is not dtype or array.shape != shape:
                    break
                if not array.flags.c_contiguous:
                    break
                same[name] = array
            else:
                return same
        if not isinstance(given, Mapping):
            raise InputError(f"the inputs are a {type(given).__name__}, not a mapping of names to arrays")
        if self._maps:
            given = self._mapped(given)
        if len(given) != len(self._specs) or any(name not in self._specs for name in given):
            self._refuse_names(given)
        bound: dict[str, tuple[int, str]] = {}
        prepared: dict[str, Array] = {}
        for name, spec in self._specs.items():
            array = self._array(name, given[name])
            if spec.shape is not None:
                _fit(spec, array.shape, bound)
            prepared[name] = array
        self._last = tuple((name, self._dtypes[name], array.shape) for name, array in prepared.items())
        return prepared

    def _mapped(self, given: Mapping[str, object]) -> dict[str, object]:
        mapped = dict(given)
        for vocabulary in self._maps:
            if vocabulary.input not in mapped or vocabulary.output in mapped:
                continue
            array = np.asarray(mapped[vocabulary.input])
            # The prepared input may have kept the original's name: mapped values then come as they are.
            if vocabulary.input == vocabulary.output and array.dtype == numpy_dtype(vocabulary.value_dtype):
                continue
            if vocabulary.input not in self._specs:
                del mapped[vocabulary.input]
            mapped[vocabulary.output] = vocabulary.apply(array)
        return mapped

    def _array(self, name: str, value: object) -> Array:
        array = np.asarray(value)
        wanted = self._dtypes[name]
        if array.dtype != wanted and array.dtype.kind in "US" and wanted.kind == "O":
            array = array.astype(object)
        if array.dtype != wanted:
            raise InputError(
                f"the dtype is {array.dtype}, the engine takes {self._specs[name].dtype}",
                where=f"input {name!r}",
                hint=f"Convert it first, for example with .astype({self._specs[name].dtype!r})",
            )
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def _refuse_names(self, given: Mapping[str, object]) -> None:
        strings = {vocabulary.output: vocabulary.input for vocabulary in self._maps}
        missing = [strings.get(name, name) for name in self._specs if name not in given]
        unknown = [name for name in given if name not in self._specs]
        parts = []
        if missing:
            parts.append(f"missing: {', '.join(map(repr, missing))}")
        if unknown:
            parts.append(f"unknown: {', '.join(map(repr, unknown))}")
        takes = "; ".join(
            f"{strings[name]}: string{str(spec)[len(name) + 2 + len(spec.dtype) :]} (or {spec})"
            if name in strings
            else str(spec)
            for name, spec in self._specs.items()
        )
        raise InputError(f"the inputs do not match the engine's ({'; '.join(parts)})", hint=f"It takes {takes}")


def _fit(spec: TensorSpec, shape: tuple[int, ...], bound: dict[str, tuple[int, str]]) -> None:
    assert spec.shape is not None
    fits = len(shape) == len(spec.shape)
    if fits:
        for declared, actual in zip(spec.shape, shape, strict=True):
            if isinstance(declared, int):
                fits = fits and declared == actual
            elif isinstance(declared, str):
                first = bound.setdefault(declared, (actual, spec.name))
                if first[0] != actual:
                    raise InputError(
                        f"the dimension {declared!r} is {actual} here but {first[0]} in input {first[1]!r}",
                        where=f"input {spec.name!r}",
                    )
    if not fits:
        declared_text = ", ".join("?" if d is None else str(d) for d in spec.shape)
        actual_text = ", ".join(map(str, shape))
        raise InputError(
            f"the shape is [{actual_text}], the engine takes [{declared_text}]", where=f"input {spec.name!r}"
        )
