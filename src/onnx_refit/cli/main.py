"""The command ``onnx-refit``: exit code 0 for success, 1 when the work failed, 2 for bad usage, 130 when interrupted.

Nothing is imported before ``main`` runs but what Python itself has loaded: what takes time to load is loaded where an
interrupt is caught.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201 - while loading there may be nothing else to print with
        return 130


def _run(arguments: list[str]) -> int:
    import click

    from onnx_refit.cli.commands import cli
    from onnx_refit.errors import OnnxRefitError

    debug = "--debug" in arguments
    # Accepted anywhere on the line, as people append it to a command that has just failed.
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # Not standalone: click then raises its errors, and returns the code of an Exit.
        code = cli.main(args=arguments, prog_name="onnx-refit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except BrokenPipeError:
        # The reader of our output went away; leave quietly, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OnnxRefitError as error:
        return _failed(f"error: {error}", debug)
    except OSError as error:
        # Files that this library opens have errors of their own; this is stdout, or a full temporary directory.
        return _failed(f"error: {error.filename or 'the output'}: {error.strerror or error}", debug)
    except MemoryError:
        return _failed("error: out of memory", debug)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line for people, --debug for the rest
        return _failed(f"internal error: {type(error).__name__}: {error}. Run with --debug for the traceback", debug)
    return code if isinstance(code, int) else 0


def _failed(line: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    from onnx_refit.cli.output import err

    err().print(line, markup=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
