"""The commands by name. Each is loaded when it is asked for, so that help, usage errors and completion are quick."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

import click

from onnx_refit._version import __version__

# Name: the module and what it is called there; its summary, which a test holds to the command's own.
COMMANDS = {
    "prepare": (
        "onnx_refit.cli.plans:prepare_command",
        "Rewrite MODEL until the engine can run it; vocabularies become JSON files beside OUTPUT.",
    ),
    "build": (
        "onnx_refit.cli.plans:build_command",
        "Compile MODEL into a plan: one file, ready to load and to refit.",
    ),
    "inspect": (
        "onnx_refit.cli.plans:inspect_command",
        "Show a plan: inputs, outputs, every refittable weight and what depends on it.",
    ),
    "check": (
        "onnx_refit.cli.weights:check_command",
        "Check WEIGHTS against PLAN without changing anything: accepted, rejected with reasons, missing, not used.",
    ),
    "refit": (
        "onnx_refit.cli.weights:refit_command",
        "Write PLAN with other WEIGHTS to OUTPUT; PLAN itself stays as it is unless OUTPUT names it.",
    ),
    "run": (
        "onnx_refit.cli.running:run_command",
        "Run one inference of PLAN on the arrays of an npz file.",
    ),
    "diff": (
        "onnx_refit.cli.weights:diff_command",
        "Compare two checkpoints (or plans) tensor by tensor.",
    ),
    "bench": (
        "onnx_refit.cli.running:bench_command",
        "Measure PLAN here: load, inference, refit, and a plain copy of the same bytes beside it (medians).",
    ),
    "serve": (
        "onnx_refit.cli.serving:serve_command",
        "Serve PLANs over HTTP and gRPC; refits are verbs of the server.",
    ),
    "push": (
        "onnx_refit.cli.serving:push_command",
        "Upload WEIGHTS to a server and stage them; requests do not see them before a commit.",
    ),
    "commit": (
        "onnx_refit.cli.serving:commit_command",
        "Publish what was STAGED by push (its id): requests from now on are answered by it.",
    ),
    "rollback": (
        "onnx_refit.cli.serving:rollback_command",
        "Publish an earlier version of a server's model again.",
    ),
    "status": (
        "onnx_refit.cli.serving:status_command",
        "Show the versions of a server's model, and what is staged.",
    ),
    "check-tensorrt": (
        "onnx_refit.cli.tensorrt:check_tensorrt_command",
        "Ask NVIDIA's parser what it accepts of MODEL, node by node, before and after our rewrites.",
    ),
    "bidaf": (
        "onnx_refit.samples.bidaf.cli:bidaf",
        "The sample: BiDAF prepared, built, refitted and answering questions.",
    ),
}


class Commands(click.Group):
    """A group of the commands above, in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the line names; UsageError with the nearest names if there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], COMMANDS, cutoff=0.7)
            if not near:
                raise
            raise click.UsageError(f"{error.format_message()} Meant: {' or '.join(near)}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names and summaries, without loading the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="onnx-refit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Compile an ONNX model once, then replace the weights of the compiled engine in place."""
