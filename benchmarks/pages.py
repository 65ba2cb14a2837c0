"""Markdown pages with blocks that are made from result files: ``<!-- bench:NAME -->`` to ``<!-- /bench:NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_START = re.compile(r"<!-- bench:([a-z-]+) -->")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def names(text: str) -> list[str]:
    """The blocks of a page, in their order."""
    return _START.findall(text)


def filled(text: str, name: str, body: str) -> str:
    """The page with another body between the markers of one block.

    Raises:
        ValueError: the page does not have the two markers exactly once, in this order.
    """
    start, stop = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(start) != 1 or text.count(stop) != 1 or text.index(start) > text.index(stop):
        raise ValueError(f"a page needs the markers {start} and {stop} once each, in this order")
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(stop)
    return f"{head}{start}\n{body}\n{stop}{tail}"
