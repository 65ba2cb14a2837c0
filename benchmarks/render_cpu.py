"""The README's tables about the CPU engine, from the result files."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import geometric_mean
from benchmarks.pages import table

PEERS = ("OpenVINO f32", "OpenVINO bf16", "PyTorch", "torch.compile")


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
    lines.append(table(["model", "input", "threads", "baked", "onnx-refit", *PEERS], inference))
    lines.append(
        "\nRefit: new arrays in memory to the first answer from them (less a steady answer), over a plain one-thread"
        " copy of the bytes. That copy goes again and again between the same arrays, so of small models it stays in the"
        " caches; the copy in its place comes after what a refit comes after, from arrays and into memory last used as"
        " long ago. The call is that of refit alone, without the first answer's reading of weights that are in no cache"
        " yet, over that copy. A rebuild goes from new arrays to the first answer too: the arrays put into the ONNX"
        " model, the model serialised, a session made of it; the quickest one hands the arrays to the session instead"
        " (`add_external_initializers`). P99 under refits is that of one client while another thread refits every 50"
        " ms, over that alone: seconds of both in turn, after three refits (the first ones write to memory that the"
        " system has yet to give), at least 1,000 requests of either, and the median of five such ratios:\n"
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
                    f"{refit['over_copy_in_place']:.2f}",
                    f"{refit['call_over_copy_in_place']:.2f}",
                    f"{refit['full_speed_over_copy']:.2f}",
                    f"{refit['rebuild_over_refit']:.1f}x",
                    f"{refit['quickest_rebuild_over_refit']:.1f}x" if "quickest_rebuild_over_refit" in refit else "–",
                    f"{refit['partial']['over_full']:.3f}",
                    f"{tail['p99_over_idle']:.2f}",
                    f"{tail['refits'] / tail['seconds']:.0f}",
                ]
            )
    columns = [
        "model",
        "weights, tensors",
        "threads",
        "copy",
        "refit / copy",
        "refit / copy in its place",
        "call / copy in its place",
        "full speed / copy",
        "rebuild / refit",
        "quickest rebuild / refit",
        "1 % of tensors / all",
        "p99 under refits / idle",
        "refits a second then, of 20",
    ]
    lines.append(table(columns, refits))
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
    lines.append(table(["model", "one version", "two versions", "peak of the build", "build / bake"], memory))
    return "\n".join(lines)


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
    text = table(["weights", "tensors", "refit", "copy", "refit / copy", "a tensor"], rows)
    if "lines" not in data:  # figures taken before there were any
        return text
    large, many = data["lines"]["by_bytes"], data["lines"]["by_tensors"]
    return (
        f"{text}\n\nThe nearest straight lines: {large['seconds'] * 1e3:.2f} ms and "
        f"{large['seconds_each'] * 1e12:.0f} ms a GB of few large tensors (no row is further than "
        f"{large['largest_deviation'] * 100:.0f} % from it), {many['seconds'] * 1e3:.2f} ms and "
        f"{many['seconds_each'] * 1e6:.1f} us a tensor of many small ones ({many['largest_deviation'] * 100:.0f} %)."
    )
