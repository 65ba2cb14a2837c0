"""An inference request and its response, whichever way they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx_refit.errors import InputError, VersionError
from onnx_refit.tensors import Array

# Versions are counted from 1; more digits than this are no version of anybody's.
_VERSION_DIGITS = 18


@dataclass(frozen=True)
class WantedOutput:
    """An output that the client asked for; ``binary`` None leaves the choice to the request."""

    name: str
    binary: bool | None = None


@dataclass(frozen=True)
class InferRequest:
    """One inference as a client asks for it.

    Attributes:
        inputs: input name -> array.
        outputs: the outputs wanted; None means all.
        id: the client's name for the request, given back as it is.
        version: which version is to answer; None leaves it to the server.
        split_key: requests with the same key go to the same version of a traffic split.
        timeout: seconds within which an answer is of use.
        binary: whether outputs travel as raw bytes unless they say otherwise.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[WantedOutput, ...] | None = None
    id: str = ""
    version: int | None = None
    split_key: str | None = None
    timeout: float | None = None
    binary: bool = False

    @property
    def output_names(self) -> list[str] | None:
        """The names of the outputs wanted."""
        return None if self.outputs is None else [output.name for output in self.outputs]


@dataclass(frozen=True)
class InferResponse:
    """What answered: outputs, and the version they come from."""

    model: str
    version: int
    outputs: Mapping[str, Array]
    parameters: Mapping[str, object] = field(default_factory=dict)


def parse_version(text: object) -> int | None:
    """A version from a path, a header or a message; None for an empty one.

    Raises:
        VersionError: it is no version number.
    """
    if text is None or text == "":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= _VERSION_DIGITS and int(text):
        return int(text)
    raise VersionError(f"{str(text)[:40]!r} is no version", hint="Versions are numbers from 1")


def parse_timeout(value: object) -> float | None:
    """A timeout in microseconds (the protocol's ``timeout`` parameter) as seconds; None for none."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise InputError("the parameter 'timeout' must be a number of microseconds")
    return value / 1e6 if value else None
