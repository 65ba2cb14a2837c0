"""The tables of docs/serving.md, made from the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import table

OURS = "onnx-refit"
_FORMS = {
    "json": "REST, JSON",
    "binary": "REST, binary tensors",
    "grpc": "gRPC",
}


def serving_tables(data: Mapping[str, Any]) -> str:
    """Throughput and latency beside the peers, and under commits, as Markdown."""
    about = data["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in data["peers"].items())
    lines = [
        f"Measured on {about['cores']} cores of {about['processor']}, which the load generator shares; Python "
        f"{about['python']}; {peers}. Requests/s, p50 / p99 in ms; in bold the best peer's requests/s.",
    ]
    for case in data["cases"].values():
        for form, by_clients in case["forms"].items():
            quiet = f"{case['rounds']} rounds, load before {case['load_before']:.1f}"
            lines.append(f"\n{case['title']}, {_FORMS[form]} ({quiet}):\n")
            lines.append(_table(by_clients))
    if "commits" in data:
        lines += ["", _commits(data["commits"])]
    return "\n".join(lines)


def _table(by_clients: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    counts = list(by_clients)
    names = list(next(iter(by_clients.values())))
    best = {count: _best(by_clients[count], [name for name in names if not name.startswith(OURS)]) for count in counts}
    rows = []
    for name in names:
        cells = [_cell(by_clients[count][name], bold=best[count] == name) for count in counts]
        rows.append([name, *cells])
    ratios = []
    for count in counts:
        figures = by_clients[count]
        peer = best[count]
        mine = max(figure["rps"] for name, figure in figures.items() if name.startswith(OURS))
        ratios.append("–" if peer is None else f"{mine / figures[peer]['rps']:.2f}")
    rows.append(["our better one / best peer", *ratios])
    return table(["", *(f"{count} client{'s' * (count != '1')}" for count in counts)], rows)


def _best(figures: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str | None:
    return max(names, key=lambda name: figures[name]["rps"], default=None)


def _cell(figure: Mapping[str, float], *, bold: bool) -> str:
    rate = f"{figure['rps']:.0f}"
    failed = f" ({figure['failed']:.0f} failed)" if figure["failed"] else ""
    return f"{f'**{rate}**' if bold else rate}, {_ms(figure['p50'])} / {_ms(figure['p99'])}{failed}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _commits(data: Mapping[str, Any]) -> str:
    rows = []
    for way in data["ways"].values():
        for count, figures in way["clients"].items():
            ratios = figures["p99_over_idle_rounds"]
            rows.append(
                [
                    way["title"] if count == next(iter(way["clients"])) else "",
                    count,
                    f"{_ms(figures['idle_p50'])} / {_ms(figures['idle_p99'])}",
                    f"{_ms(figures['p50'])} / {_ms(figures['p99'])}",
                    f"**{figures['p99_over_idle']:.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    f"{figures['near_share']:.0%}, {_ms(figures['near_p99'])}",
                    f"{figures['failed']:.0f}",
                ]
            )
    took = ", ".join(f"{way['times']} times {way['seconds'] * 1e3:.0f} ms" for way in data["ways"].values())
    head = (
        f"New weights every second, in three ways ({took}; medians of {data['rounds']} rounds of "
        f"{data['seconds_a_round']} s, the ways by turns; load before {data['load_before']:.1f}). Idle are the "
        "requests of the same run that do not fall into what is done or the 0.1 s after it; p50 / p99 in ms:\n\n"
    )
    columns = ["every second", "clients", "idle", "all", "p99 over idle (rounds)", "share near it, their p99", "failed"]
    return head + table(columns, rows)


def cluster_table(data: Mapping[str, Any]) -> str:
    """Refits of all replicas of a Ray cluster, and what requests feel of them, as Markdown."""
    rows = []
    for case in data["cases"]:
        phases, quiet, under = case["phases_seconds"], case["quiet_ms"], case["during_refits_ms"]
        rows.append(
            [
                f"{case['megabytes']:.0f} MB",
                f"{case['refit_seconds']:.2f} s",
                f"{phases['prepare']:.2f} s",
                f"{phases['decide']:.2f} s",
                f"{phases['publish'] * 1e3:.0f} ms",
                f"{quiet['p50']:.1f} / {quiet['p99']:.0f}",
                f"{under['p50']:.1f} / {under['p99']:.0f}",
            ]
        )
    head = (
        f"{data['nodes']} nodes' processes on one machine of {data['machine']['cores']} cores, {data['replicas']} "
        f"replicas, two clients asking; Ray {data['ray']}; medians of {data['refits']} refits; p50 / p99 of requests "
        "in ms:\n\n"
    )
    columns = [
        "weights",
        "refit",
        "of it staging",
        "the durable write",
        "old and new answers",
        "requests, quiet",
        "requests, during refits",
    ]
    return head + table(columns, rows)
