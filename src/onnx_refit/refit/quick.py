"""Frozen dataclasses made at once: their own ``__init__`` sets each field by a call, which is most of what it costs."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def frozen(kind: type[T], fields: dict[str, Any]) -> T:
    """An instance of a frozen dataclass without slots or a ``__post_init__``.

    Args:
        kind: the class.
        fields: every field of it; becomes the instance's own.
    """
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made
