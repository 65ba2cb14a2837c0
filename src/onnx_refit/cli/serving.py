"""``serve``, ``push``, ``commit``, ``rollback`` and ``status``: a server, and refits of a server that runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from onnx_refit import api
from onnx_refit.cli.output import counted, emit_json, human_bytes, json_option, progress, say, spinner, table
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.errors import OnnxRefitError
from onnx_refit.files import read_error
from onnx_refit.refit.live import Engine
from onnx_refit.serve.client import RefitClient, ServerError
from onnx_refit.serve.settings import Batching, Limits, Settings, Tls

PATH = click.Path(path_type=Path)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MILLISECOND = 1e-3
_MB = 1_000_000


def _token(option: str, variable: str, path: Path | None) -> str | None:
    """A token from a file or the environment; never from the command line, where every process can read it."""
    if path is None:
        return os.environ.get(variable) or None
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise read_error(path, error if isinstance(error, OSError) else OSError("not a text file")) from error
    if not text:
        raise click.BadParameter("the file is empty", param_hint=option)
    return text


def _named_plans(plans: tuple[str, ...]) -> dict[str, Path]:
    """NAME=PATH or PATH, whose name is then the file's."""
    named: dict[str, Path] = {}
    for text in plans:
        name, separator, path = text.partition("=")
        if not separator:
            name, path = Path(text).stem, text
        if not _NAME.fullmatch(name):
            raise click.BadParameter(f"{name!r} is no name for a model: letters, digits and . _ - only")
        if name in named:
            raise click.BadParameter(f"two plans are called {name!r}; name them: NAME=PATH")
        named[name] = Path(path)
    return named


def _load(named: Mapping[str, Path], store: Path | None, keep: int, threads: int) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    try:
        for name, path in named.items():
            with spinner(f"loading {path}"):
                durable: dict[str, Any] = {} if store is None else {"store": store / name}
                engines[name] = api.load(path, keep=keep, options=EngineOptions(threads=threads), **durable)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


@click.command("serve")
@click.argument("plans", nargs=-1, required=True, metavar="[NAME=]PLAN...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="HTTP port; 0 takes one.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="gRPC port; none by default.")
@click.option("--store", type=PATH, help="Directory that keeps the versions: a restart answers with the last one.")
@click.option("--keep", type=click.IntRange(1), default=4, show_default=True, help="Versions held in memory.")
@click.option("--token-file", type=PATH, help="File with the token for refits; or set ONNX_REFIT_TOKEN.")
@click.option("--infer-token-file", type=PATH, help="File with a token for inference; or ONNX_REFIT_INFER_TOKEN.")
@click.option("--tls-cert", type=PATH, help="Certificate (PEM).")
@click.option("--tls-key", type=PATH, help="Its key (PEM).")
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True, help="Inferences at a time.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of one inference; 0 chooses.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Most rows of a batch; 1: none.")
@click.option("--batch-delay-ms", type=click.FloatRange(0), default=0.0, help="How long a batch may wait for more.")
@click.option("--queue", type=click.IntRange(1), default=256, show_default=True, help="Requests that may wait.")
@click.option("--max-body-mb", type=click.IntRange(1), default=64, show_default=True, help="Largest request.")
@click.option("--max-upload-mb", type=click.IntRange(1), default=65536, show_default=True, help="Largest upload.")
@click.option("--request-seconds", type=click.FloatRange(0.001), default=60.0, show_default=True, help="Deadline.")
@click.option("--drain-seconds", type=click.FloatRange(0), default=30.0, show_default=True, help="Time to finish.")
@click.option("--spool", type=PATH, help="Directory for uploads; a temporary one by default.")
@click.option("--access-log/--no-access-log", default=True, help="A log line for every request.")
@click.option(
    "--weights-from",
    multiple=True,
    metavar="ALIAS=PLACE",
    help="A directory or an https URL that clients may point to for weights, by its alias; may be repeated.",
)
def serve_command(plans: tuple[str, ...], **options: Any) -> None:
    """Serve PLANs over HTTP and gRPC; refits are verbs of the server. Logs JSON lines on stderr."""
    from onnx_refit.serve.extras import require_serve

    require_serve()
    from onnx_refit.serve.logs import configure_logging
    from onnx_refit.serve.origins import parse_origins
    from onnx_refit.serve.server import serve

    named = _named_plans(plans)
    tls = None
    if options["tls_cert"] is not None or options["tls_key"] is not None:
        if options["tls_cert"] is None or options["tls_key"] is None:
            raise click.UsageError("--tls-cert and --tls-key belong together")
        tls = Tls(options["tls_cert"], options["tls_key"])
    settings = Settings(
        host=options["host"],
        port=options["port"],
        grpc_port=options["grpc_port"],
        admin_token=_token("--token-file", "ONNX_REFIT_TOKEN", options["token_file"]),
        infer_token=_token("--infer-token-file", "ONNX_REFIT_INFER_TOKEN", options["infer_token_file"]),
        tls=tls,
        limits=Limits(
            body_bytes=options["max_body_mb"] * _MB,
            upload_bytes=options["max_upload_mb"] * _MB,
            queue=options["queue"],
            request_seconds=options["request_seconds"],
        ),
        batching=Batching(options["batch"], options["batch_delay_ms"] * _MILLISECOND),
        instances=options["instances"],
        drain_seconds=options["drain_seconds"],
        spool=options["spool"],
        # Beside the versions: a client that asks again after a restart learns what became of its commit.
        memory=options["store"],
        access_log=options["access_log"],
        weights_from=parse_origins(options["weights_from"]),
    )
    configure_logging()
    engines = _load(named, options["store"], options["keep"], options["threads"])
    try:
        if not serve(engines, settings):
            # Ending Python while ONNX Runtime still computes aborts the process; all that matters is on disk.
            sys.stderr.flush()
            os._exit(1)
    except OSError as error:
        raise OnnxRefitError(str(error.strerror or error)) from error
    finally:
        for engine in engines.values():
            engine.close()


def _client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which server and model."""
    for option in (
        click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server."),
        click.option("--model", help="The model; not needed where the server has only one."),
        click.option("--token-file", type=PATH, help="File with the token for refits; or set ONNX_REFIT_TOKEN."),
    ):
        command = option(command)
    return command


def _connect(url: str, model: str | None, token_file: Path | None) -> tuple[RefitClient, str]:
    client = RefitClient(url, _token("--token-file", "ONNX_REFIT_TOKEN", token_file))
    if model is not None:
        return client, model
    models = client.models()
    if len(models) != 1:
        raise click.UsageError(f"the server has several models, choose one with --model: {', '.join(models)}")
    return client, models[0]


@click.command("push")
@click.argument("weights", type=PATH)
@_client_options
@click.option("--label", help="What the version is called in lists; the file's name by default.")
@click.option("--partial", is_flag=True, help="Weights that are not given stay as they are.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinities.")
@click.option("--allow-rounding", is_flag=True, help="Accept a cast that rounds values.")
@click.option("--commit", "and_commit", is_flag=True, help="Commit at once.")
@click.option(
    "--from", "place", metavar="ALIAS", help="WEIGHTS is a name at a place that the server's operator allows."
)
@click.option("--sha256", help="With --from: of the file, in hex.")
@json_option
def push_command(
    weights: Path,
    url: str,
    model: str | None,
    token_file: Path | None,
    label: str | None,
    partial: bool,
    allow_nonfinite: bool,
    allow_rounding: bool,
    and_commit: bool,
    place: str | None,
    sha256: str | None,
    as_json: bool,
) -> None:
    """Upload WEIGHTS to a server and stage them; requests do not see them before a commit."""
    if sha256 is not None and place is None:
        raise click.UsageError("--sha256 belongs to --from; an upload's hash is computed and compared anyhow")
    client, name = _connect(url, model, token_file)
    options: dict[str, Any] = {
        "label": label,
        "partial": partial,
        "allow_nonfinite": allow_nonfinite,
        "allow_rounding": allow_rounding,
    }
    try:
        if place is not None:
            with spinner(f"fetching {place}:{weights.as_posix()}"):
                staged = client.fetch(name, place, weights.as_posix(), sha256=sha256, **options)
        else:
            size = weights.stat().st_size if weights.is_file() else None
            with progress(f"uploading {weights.name}", size, as_bytes=True, quiet=as_json) as update:
                staged = client.stage(name, weights, progress=lambda done, _: update(done), **options)
    except ServerError as error:
        if as_json and error.body:
            emit_json(error.body)
        raise
    committed = client.commit(name, staged["id"]) if and_commit and staged["state"] == "staged" else None
    if as_json:
        emit_json({"staged": staged, "committed": committed})
        return
    changed = counted(len(staged["changed"]), "weight changes", "weights change")
    if staged["state"] == "committed" and committed is None:
        say(f"these weights answer already, as version {staged['version']}")
        return
    say(f"staged {weights.name} as {staged['id']}: {changed}, {human_bytes(staged['bytes'])}")
    if committed is None:
        say(f"publish it with: onnx-refit commit {staged['id']}")
    else:
        say(f"version {committed['version']} answers now (it was {committed['previous']})")


@click.command("commit")
@click.argument("staged")
@_client_options
@click.option("--require-canary", is_flag=True, help="Only if a canary has passed on it.")
@json_option
def commit_command(
    staged: str, url: str, model: str | None, token_file: Path | None, require_canary: bool, as_json: bool
) -> None:
    """Publish what was STAGED by push (its id): requests from now on are answered by it."""
    client, name = _connect(url, model, token_file)
    committed = client.commit(name, staged, require_canary=require_canary)
    if as_json:
        emit_json(committed)
        return
    again = " (it was committed before)" if committed["repeated"] else ""
    say(f"version {committed['version']} is committed, it follows {committed['previous']}{again}")


@click.command("rollback")
@_client_options
@click.option("--to", type=click.IntRange(1), help="Which version; the one before the current by default.")
@json_option
def rollback_command(url: str, model: str | None, token_file: Path | None, to: int | None, as_json: bool) -> None:
    """Publish an earlier version of a server's model again."""
    client, name = _connect(url, model, token_file)
    account = client.rollback(name, to)
    if as_json:
        emit_json(account)
        return
    say(f"version {account['version']} answers now (it was {account['previous']})")


@click.command("status")
@_client_options
@json_option
def status_command(url: str, model: str | None, token_file: Path | None, as_json: bool) -> None:
    """Show the versions of a server's model, and what is staged."""
    client, name = _connect(url, model, token_file)
    status = client.status(name)
    if as_json:
        emit_json(status)
        return
    size = human_bytes(status["weight_bytes"])
    say(f"{name}: version {status['version']} answers, {counted(status['weights'], 'weight')} of {size}")
    rows = [
        (
            version["number"],
            "answers" if version["current"] else "held" if version["held"] else "",
            version["source"],
            "all" if version["changed"] is None else version["changed"],
            version["committed"][:19].replace("T", " "),
        )
        for version in status["versions"]
    ]
    table(counted(len(rows), "version"), ["version", "", "from", "changed", "committed (UTC)"], rows, right=(0, 3))
    if status["staged"]:
        waiting = [(entry["id"], entry["label"], len(entry["changed"])) for entry in status["staged"]]
        table(f"{len(waiting)} staged", ["id", "from", "changed"], waiting, right=(2,))
    if status["traffic"]:
        shares = [(version, f"{share:.1%}") for version, share in status["traffic"].items()]
        table("traffic split", ["version", "share"], shares, right=(0, 1))
