"""The command ``onnx-refit``: exit code 0 for success, 1 when the work failed, 2 for bad usage."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from onnx_refit._version import __version__
from onnx_refit.cli.output import err
from onnx_refit.cli.plans import build_command, inspect_command, prepare_command
from onnx_refit.cli.running import bench_command, run_command
from onnx_refit.cli.serving import commit_command, push_command, rollback_command, serve_command, status_command
from onnx_refit.cli.tensorrt import check_tensorrt_command
from onnx_refit.cli.weights import check_command, diff_command, refit_command
from onnx_refit.errors import OnnxRefitError
from onnx_refit.samples.bidaf.cli import bidaf


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="onnx-refit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Compile an ONNX model once, then replace the weights of the compiled engine in place."""


for command in (
    prepare_command,
    build_command,
    inspect_command,
    check_command,
    refit_command,
    run_command,
    diff_command,
    bench_command,
    serve_command,
    push_command,
    commit_command,
    rollback_command,
    status_command,
    check_tensorrt_command,
    bidaf,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # Accepted anywhere on the line, as people append it to a command that has just failed.
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # Not standalone: click then raises its errors, and returns the code of an Exit.
        code = cli.main(args=arguments, prog_name="onnx-refit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
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
        traceback.print_exc()
    err().print(line, markup=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
