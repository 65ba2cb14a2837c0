r"""Rules for renaming checkpoint tensors, from a small TOML file.

The file holds rules that are tried in order on every name; each one that fits is applied::

    [[rename]]
    prefix = "module."          # taken off the beginning ...
    to = ""                     # ... and replaced with this

    [[rename]]
    regex = '^h\.(\d+)\.'      # searched, and every match replaced
    to = 'blocks.\1.'

    [[drop]]
    regex = "^optimizer\."      # not part of the model: not reported as unused

The result are names of tensors as the plan's map or the model itself has them.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.provenance.expression import Expression, Stored
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.mapped import unreadable
from onnx_refit.weights.view import ViewProblem, ViewProblemKind

_MAX_BYTES = 1_000_000
_HINT = "A rule has prefix or regex; one under [[rename]] also has to"


@dataclass(frozen=True)
class Rule:
    r"""One rule: a pattern of names and what becomes of them.

    Attributes:
        pattern: what is searched.
        to: the replacement, with ``\1`` for groups; None drops the tensor.
    """

    pattern: re.Pattern[str]
    to: str | None


@dataclass(frozen=True)
class Rules:
    """Renaming rules, applied in order.

    Attributes:
        rules: the rules.
    """

    rules: Sequence[Rule]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rules:
        """Read a rules file.

        Raises:
            WeightsError: it cannot be read, is no TOML, or holds something that is no rule.
        """
        file = Path(path)
        try:
            with file.open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise unreadable(file, error) from error
        if len(data) > _MAX_BYTES:
            raise WeightsError("the rules are longer than a megabyte", where=file)
        try:
            return cls.parse(data.decode("utf-8"), where=str(file))
        except UnicodeDecodeError as error:
            raise WeightsError(f"the rules are no UTF-8 text: {error}", where=file) from error

    @classmethod
    def parse(cls, text: str, *, where: str = "rules") -> Rules:
        """Rules from the text of a file; WeightsError where it holds something else."""
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise WeightsError(f"no TOML: {error}", where=where) from error
        unknown = document.keys() - {"rename", "drop"}
        if unknown:
            raise WeightsError(f"unknown key {sorted(unknown)[0]!r}", where=where, hint="Known are rename and drop")
        # Dropping looks at the names of the checkpoint, so it comes first.
        return cls((*_section(document, "drop", where), *_section(document, "rename", where)))

    def rename(self, name: str) -> str | None:
        """The new name of a tensor, None where it is dropped; WeightsError where a replacement is no valid one."""
        for rule in self.rules:
            if rule.to is None:
                if rule.pattern.search(name):
                    return None
                continue
            try:
                name = rule.pattern.sub(rule.to, name)
            except (re.error, IndexError) as error:
                raise WeightsError(
                    f"the replacement {rule.to!r} does not fit {rule.pattern.pattern!r}: {error}"
                ) from error
        return name

    def apply(self, source: WeightSource) -> RenamedView:
        """A checkpoint under its new names; WeightsError where a replacement is no valid one."""
        return RenamedView(source, {name: self.rename(name) for name in source.specs})


def _section(document: Mapping[str, Any], kind: str, where: str) -> list[Rule]:
    entries = document.get(kind, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise WeightsError(f"{kind} is no list of rules", where=where, hint=f"Write [[{kind}]]")
    return [_rule(entry, kind, f"{where}, [[{kind}]] {i + 1}") for i, entry in enumerate(entries)]


def _rule(entry: Mapping[str, Any], kind: str, where: str) -> Rule:
    wanted = {"to"} if kind == "rename" else set()
    pattern = entry.keys() & {"prefix", "regex"}
    if len(pattern) != 1 or entry.keys() - pattern != wanted or not all(isinstance(v, str) for v in entry.values()):
        raise WeightsError("no rule", where=where, hint=_HINT)
    try:
        if "prefix" in entry:
            to = None if kind == "drop" else entry["to"].replace("\\", "\\\\")
            return Rule(re.compile("^" + re.escape(entry["prefix"])), to)
        return Rule(re.compile(entry["regex"]), entry.get("to"))
    except re.error as error:
        raise WeightsError(f"no regular expression: {error}", where=where) from error


class RenamedView:
    """A checkpoint whose tensors have new names.

    Args:
        source: the checkpoint.
        names: its name of each tensor -> the new one, None for those that are left out.
    """

    def __init__(self, source: WeightSource, names: Mapping[str, str | None]) -> None:
        self._source = source
        origins: dict[str, list[str]] = {}
        for own, new in names.items():
            if new is not None:
                origins.setdefault(new, []).append(own)
        self._origins = origins
        self._specs = MappingProxyType(
            {
                new: TensorSpec(new, source.specs[own[0]].dtype, source.specs[own[0]].shape)
                for new, own in origins.items()
                if len(own) == 1
            }
        )
        self._problems = MappingProxyType(
            {
                new: ViewProblem(
                    ViewProblemKind.AMBIGUOUS, f"the rules give this name to several tensors: {', '.join(own)}"
                )
                for new, own in origins.items()
                if len(own) > 1
            }
        )

    @property
    def description(self) -> str:
        """Where the tensors come from."""
        return self._source.description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """New name -> spec, of the tensors whose new name is theirs alone."""
        return self._specs

    @property
    def origin(self) -> tuple[WeightSource, Mapping[str, Expression]]:
        """The checkpoint, and which of its tensors each tensor of the view is."""
        return self._source, {name: Stored(self._origins[name][0]) for name in self._specs}

    def read(self, name: str) -> Array:
        """One tensor by its new name; WeightsError if there is none, or several."""
        if name not in self._specs:
            raise WeightsError(f"holds no tensor {name!r} after renaming", where=self.description)
        return self._source.read(self._origins[name][0])

    def close(self) -> None:
        """Close the checkpoint."""
        self._source.close()

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's own names of the tensors that were given a name."""
        return tuple(self._origins.get(name, ()))

    def expected(self, name: str) -> tuple[TensorSpec, ...]:
        """Nothing: rules know no weights."""
        return ()

    def why_missing(self, name: str) -> str:
        """Nothing: rules know no weights."""
        return ""

    def unused(self, wanted: Collection[str]) -> Mapping[str, TensorSpec]:
        """The tensors whose new names are not wanted, by their own names."""
        return {
            own: self._source.specs[own] for new, owns in self._origins.items() if new not in wanted for own in owns
        }

    @property
    def kept(self) -> frozenset[str]:
        """Nothing: rules know no weights."""
        return frozenset()

    def dropped(self) -> Mapping[str, str]:
        """Nothing: rules know no weights."""
        return {}

    @property
    def problems(self) -> Mapping[str, ViewProblem]:
        """New names that several tensors were given."""
        return self._problems
