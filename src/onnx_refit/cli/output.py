"""What the commands show: tables and progress bars for people, JSON for machines, errors on stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from onnx_refit.files import WriteError

_WIDE = 200


def refuse_overwrite(output: Path, *inputs: Path) -> None:
    """WriteError if the output would replace what the command reads."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise WriteError("the output would replace the input", where=output, hint="Name another file with -o")


def out() -> Console:
    """The console for results; made anew each time, so that a redirected stdout is seen."""
    return Console(soft_wrap=True, highlight=False)


def err() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of tables.")(command)


def emit_json(data: object) -> None:
    """Print data as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, default=str))


def plain(text: object) -> str:
    """Text for a terminal: names come from files, and may hold what a terminal would obey."""
    return escape(
        "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))
    )


def say(text: str) -> None:
    """Print one line for people on stdout."""
    out().print(plain(text))


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """``1 weight``, ``2 weights``."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Print a table, unless it is empty; ``right`` lists the columns to align right."""
    if not rows:
        say(title)
        return
    made = Table(title=plain(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)  # a file has room; names are broken as late as possible
    console.print(made)


def human_bytes(count: int) -> str:
    """Bytes in decimal units, as disks and links count them."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError


def shape_text(shape: Sequence[object] | None) -> str:
    """A shape as ``[2, batch, ?]``."""
    return "?" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


@contextlib.contextmanager
def spinner(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Show that something is going on (on a terminal only)."""
    if quiet:
        yield
        return
    with err().status(escape(what)):
        yield


@contextlib.contextmanager
def progress(
    what: str, total: float | None, *, as_bytes: bool = False, quiet: bool = False
) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; yields a function that takes how much was done so far."""
    console = err()
    off = quiet or not console.is_terminal  # a log file wants no bars
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    columns += [DownloadColumn(), TransferSpeedColumn()] if as_bytes else []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=off) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.update(task, completed=done)
