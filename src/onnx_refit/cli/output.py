"""What the commands show: tables and progress bars for people, JSON for machines, errors on stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table


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


def say(text: str) -> None:
    """Print one line for people on stdout."""
    out().print(escape(text))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Print a table; ``right`` lists the columns to align right."""
    made = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(made)


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
