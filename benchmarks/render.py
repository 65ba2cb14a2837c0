"""The README's tables and plots, made from the result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import geometric_mean
from benchmarks.render_serving import serving_tables
from onnx_refit.files import write_text


def render(results: Path, readme: Path, docs: Path) -> None:
    """Replace what stands between the markers of the README, and draw the plots."""
    text = readme.read_text(encoding="utf-8")
    if (results / "cpu.json").exists():
        data = json.loads((results / "cpu.json").read_text())
        text = _replace(text, "cpu", cpu_tables(data))
        _plot_cases(data, docs / "cpu.svg")
    if (results / "growth.json").exists():
        data = json.loads((results / "growth.json").read_text())
        text = _replace(text, "growth", growth_table(data))
        _plot_growth(data, docs / "growth.svg")
    write_text(readme, text)
    if (results / "serving.json").exists():
        page = docs / "serving.md"
        tables = serving_tables(json.loads((results / "serving.json").read_text()))
        write_text(page, _replace(page.read_text(encoding="utf-8"), "serving", tables))


def _replace(text: str, name: str, body: str) -> str:
    start, stop = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if start not in text or stop not in text:
        raise SystemExit(f"the page lacks the markers {start} and {stop}")
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(stop)
    return f"{head}{start}\n{body}\n{stop}{tail}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cpu_tables(data: dict[str, Any]) -> str:
    """All CPU figures as Markdown."""
    about = data["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        f"Measured on {about['cores']} cores of {about['processor']} ({', '.join(about['vector'])}); {packages}.",
        "",
    ]
    inference, ours = [], []
    for entry in data["cases"].values():
        for row in entry["rows"]:
            for label, figures in row["inference"].items():
                over = figures["over_baked"]
                ours.append(over["onnx-refit"])
                peers = [f"{over[name]:.2f}" if name in over else "–" for name in PEERS]
                inference.append(
                    [
                        row["case"],
                        label,
                        str(row["threads"]),
                        f"{figures['seconds']['baked'] * 1e3:.2f} ms",
                        f"**{over['onnx-refit']:.2f}**",
                        *peers,
                    ]
                )
    lines.append(
        f"Inference time over a baked ONNX Runtime session (geometric mean of ours: {geometric_mean(ours):.3f}):\n"
    )
    lines.append(_table(["model", "input", "threads", "baked", "onnx-refit", *PEERS], inference))
    lines.append(
        "\nRefit: new arrays in memory to the first answer from them, over a plain one-thread copy of the bytes:\n"
    )
    refits = []
    for entry in data["cases"].values():
        for row in entry["rows"]:
            refit, tail = row["refit"], row["tail"]
            refits.append(
                [
                    row["case"],
                    f"{row['weight_bytes'] / 1e6:.0f} MB, {row['tensors']}",
                    str(row["threads"]),
                    f"{refit['copy_seconds'] * 1e3:.2f} ms",
                    f"**{refit['over_copy']:.2f}**",
                    f"{refit['full_speed_over_copy']:.2f}",
                    f"{refit['rebuild_over_refit']:.0f}x",
                    f"{refit['partial']['over_full']:.3f}",
                    f"{tail['p99_over_idle']:.2f}",
                ]
            )
    columns = [
        "model",
        "weights, tensors",
        "threads",
        "copy",
        "refit / copy",
        "full speed / copy",
        "rebuild / refit",
        "1 % of tensors / all",
        "p99 under refits / idle",
    ]
    lines.append(_table(columns, refits))
    lines.append("\nMemory over the weights, and build time over creating a baked session once:\n")
    memory = [
        [
            entry["rows"][0]["case"],
            f"{entry['memory']['one_version_over_weights']:.2f}",
            f"{entry['memory']['two_versions_over_weights']:.2f}",
            f"{entry['memory']['build_peak_over_weights']:.1f}",
            f"{entry['rows'][0]['build_over_bake']:.1f}",
        ]
        for entry in data["cases"].values()
    ]
    lines.append(_table(["model", "one version", "two versions", "peak of the build", "build / bake"], memory))
    return "\n".join(lines)


PEERS = ("OpenVINO f32", "OpenVINO bf16", "PyTorch", "torch.compile")


def growth_table(data: dict[str, Any]) -> str:
    """Cost by bytes and by tensors as Markdown."""
    rows = [
        [
            f"{row['bytes'] / 1e6:.1f} MB",
            str(row["tensors"]),
            f"{row['refit_seconds'] * 1e3:.2f} ms",
            f"{row['copy_seconds'] * 1e3:.2f} ms",
            f"{row['refit_seconds'] / row['copy_seconds']:.2f}",
            f"{row['refit_seconds'] / row['tensors'] * 1e6:.1f} us",
        ]
        for row in (*data["by_bytes"], *data["by_tensors"])
    ]
    return _table(["weights", "tensors", "refit", "copy", "refit / copy", "a tensor"], rows)


def _plot_cases(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, ours, refit = [], [], []
    for entry in data["cases"].values():
        row = entry["rows"][0]
        for label, figures in row["inference"].items():
            labels.append(f"{row['case']} {label}")
            ours.append(figures["over_baked"]["onnx-refit"])
            refit.append(row["refit"]["over_copy"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.38 * len(labels) + 1.4), sharey=True)
    places = range(len(labels))
    left.barh(places, ours, color="#3b6ea5")
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(list(places), labels)
    left.invert_yaxis()
    left.set_xlabel("inference time over a baked session (1 thread)")
    right.barh(places, refit, color="#c07a2c")
    right.axvline(1, color="black", linewidth=1)
    right.set_xlabel("refit over a plain copy of the weights (1 thread)")
    for axis, values in ((left, ours), (right, refit)):
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, max(values) * 1.15)
    figure.tight_layout()
    _save(figure, path)


def _plot_growth(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, key, unit, label in (
        (left, "bytes", 1e6, "weights, MB (few large tensors)"),
        (right, "tensors", 1, "tensors (4 kB each, with small biases)"),
    ):
        rows = data["by_bytes" if key == "bytes" else "by_tensors"]
        x = [row[key] / unit for row in rows]
        axis.loglog(x, [row["refit_seconds"] * 1e3 for row in rows], "o-", color="#c07a2c", label="refit")
        axis.loglog(x, [row["copy_seconds"] * 1e3 for row in rows], "s--", color="#555555", label="plain copy")
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(path, buffer.getvalue())
