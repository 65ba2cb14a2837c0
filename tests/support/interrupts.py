"""Something that happens between two lines of a function: an interrupt, or what another thread does."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any


class Interrupt(BaseException):
    """What an interrupt of the user is like: it comes anywhere."""


def interrupt() -> None:
    """Be interrupted."""
    raise Interrupt


@contextlib.contextmanager
def at_line(code: CodeType, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Before the so-manieth line that a function runs in this thread, do something; never if it runs fewer."""
    steps = itertools.count(1)

    def local(_: FrameType, event: str, __: Any) -> Any:
        if event == "line" and next(steps) == step:
            act()
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code is code else None)
    try:
        yield
    finally:
        sys.settrace(before)
