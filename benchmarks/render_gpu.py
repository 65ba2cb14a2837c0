"""The tables about GPUs in docs/gpu.md and the README, from the result files (``python -m benchmarks.render_gpu``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_refit.files import write_text

_SHOWN = (
    ("ours", "ours"),
    ("ours, library recurrence", "ours on cuDNN"),
    ("torch CUDA graph", "torch, CUDA graph"),
    ("torch.compile, reduce-overhead (own process)", "torch.compile"),
    ("AOTInductor (own process)", "AOTInductor"),
    ("ORT CUDA baked", "ORT CUDA"),
    ("ORT CUDA baked, CUDA graph", "ORT, CUDA graph"),
)
HALVES = ["model", "input", "tf32", "torch graph, tf32", "bf16", "Inductor", "NumPy", "error fp32", "error tf32"]
GROUPS = ["GPUs", "weights", "NCCL broadcast alone", "our refit", "share of the bandwidth", "by copies"]
SUMMARY = [
    "model",
    "input",
    "ours",
    "over the best peer",
    "refit on the device",
    "over a copy",
    "p99 under refits / idle",
]
_TITLES = {
    "bidaf": "BiDAF",
    "encoder": "encoder 6x512",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mlp": "MLP 4x4096",
}


def render_gpu(results: Path, readme: Path, docs: Path) -> None:
    """Replace what stands between the markers ``bench:gpu`` of the README and of docs/gpu.md."""
    path = results / "gpu-h200.json"
    if not path.exists():
        return
    data = json.loads(path.read_text())
    groups = [json.loads(found.read_text()) for found in sorted(results.glob("gpu-*-group.json"))]
    page = docs / "gpu.md"
    write_text(page, _replace(page.read_text(encoding="utf-8"), "\n\n".join([about(data), *tables(data, groups)])))
    text = readme.read_text(encoding="utf-8")
    if "<!-- bench:gpu -->" in text:
        write_text(readme, _replace(text, summary(data, groups)))


def _replace(text: str, body: str) -> str:
    start, stop = "<!-- bench:gpu -->", "<!-- /bench:gpu -->"
    if start not in text or stop not in text:
        raise SystemExit(f"a page lacks the markers {start} and {stop}")
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(stop)
    return f"{head}{start}\n{body}\n{stop}{tail}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def about(data: dict[str, Any]) -> str:
    """What it was measured on."""
    machine = data["machine"]
    packages = machine["packages"]
    return (
        f"One {machine['gpus'][0]}, CUDA {machine['cuda']}, PyTorch {packages['torch']}, "
        f"CuPy {machine['cupy']}; host with {machine['cores']} cores. Medians of interleaved rounds, microseconds."
    )


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _cases(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(_TITLES[name], case) for name, case in data["cases"].items() if "inference" in case]


def session_over_refit(case: dict[str, Any]) -> float:
    """The quickest new session of any peer, from weights on the host, over our refit from device memory."""
    built = case["inference"][0]["seconds to build"]
    peers = [value for name, value in built.items() if value and "tf32" not in name and "only" not in name]
    return float(min(peers) / case["refit"]["microseconds"]["refit from bound device weights"] * 1e6)


def tables(data: dict[str, Any], groups: list[dict[str, Any]]) -> list[str]:
    """All GPU figures as Markdown."""
    inference, halves, refits = [], [], []
    for title, case in _cases(data):
        for row in case["inference"]:
            figures = row["microseconds"]
            over = f"**{row['ours over best peer']:.2f}** ({row['best peer'].removesuffix(' (own process)')})"
            inference.append([title, row["input"], *(_us(figures.get(key)) for key, _ in _SHOWN), over])
            halves.append(
                [
                    title,
                    row["input"],
                    *(_us(figures.get(key)) for key in ("ours, tf32", "torch CUDA graph, tf32", "ours, bf16")),
                    _us(figures.get("ours, Inductor (own process)")),
                    _us(figures.get("ours, NumPy to NumPy")),
                    f"{row['largest error']['ours']:.0e}",
                    f"{row['largest error']['ours, tf32']:.0e}",
                ]
            )
        refit, us = case["refit"], case["refit"]["microseconds"]
        refits.append(
            [
                title,
                f"{refit['weights, MB']:.0f} MB, {refit['tensors']}",
                _us(us["copy within the device"]),
                f"{_us(us['refit from bound device weights'])} (**{refit['bound device refit over copy']:.2f}**)",
                f"{_us(us['refit from device weights'])} ({refit['device refit over copy']:.2f})",
                _us(us["whole transaction from device weights"]),
                f"{_us(us['refit from pinned weights'])} (**{refit['pinned refit over copy']:.2f}**)",
                _us(us["refit from NumPy arrays"]),
                f"{session_over_refit(case):,.0f}",
                f"{case['under refits']['p99 over idle']:.2f}",
            ]
        )
    large = data["cases"]["large"]
    billion = large["parameters"] / 1e9
    made = [
        "Inference in float32 without TF32; inputs and outputs lie on the device and are the caller's own:",
        _table(["model", "input", *(title for _, title in _SHOWN), "over the best"], inference),
        "Other precisions, our network through TorchInductor, and from NumPy to NumPy; errors against the CPU:",
        _table(
            ["model", "input", "tf32", "torch graph, tf32", "bf16", "Inductor", "NumPy", "error fp32", "error tf32"],
            halves,
        ),
        "Refit of all weights, waited for; in brackets over a plain copy of the same bytes from the same place:",
        _table(
            [
                "model",
                "weights, tensors",
                "copy",
                "from bound tensors",
                "from a mapping",
                "whole transaction",
                "from pinned memory",
                "from NumPy",
                "new session / refit",
                "p99 under refits / idle",
            ],
            refits,
        ),
        f"{billion:.2f} billion parameters (4 GB): {large['seconds from device weights'] * 1e3:.1f} ms from device "
        f"memory (a plain copy: {large['seconds of a copy within the device'] * 1e3:.1f} ms), "
        f"{large['seconds from NumPy arrays']:.3f} s from NumPy arrays in pageable memory.",
    ]
    if groups:
        rows = []
        for found in groups:
            group = found["cases"]["group"]
            rows.append(
                [
                    str(len(group["devices"])),
                    f"{group['bytes'] / 1e9:.2f} GB",
                    f"{group['seconds of an NCCL broadcast'] * 1e3:.2f} ms ({group['NCCL, GB/s']:.0f} GB/s)",
                    f"{group['seconds of a group refit'] * 1e3:.2f} ms",
                    f"**{group['share of the broadcast bandwidth']:.2f}**",
                    f"{group['seconds of a group refit by copies'] * 1e3:.2f} ms",
                ]
            )
        made.append("Groups (a full refit from tensors on the first GPU, on all GPUs when it returns):")
        made.append(
            _table(
                ["GPUs", "weights", "NCCL broadcast alone", "our refit", "share of the bandwidth", "by copies"], rows
            )
        )
    return made


def summary(data: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """The README's table."""
    rows = []
    for title, case in _cases(data):
        refit = case["refit"]
        for index, row in enumerate(case["inference"]):
            first = index == 0
            rows.append(
                [
                    title,
                    row["input"],
                    f"{row['microseconds']['ours']:,.0f} us",
                    f"{row['ours over best peer']:.2f}",
                    f"{refit['microseconds']['refit from bound device weights']:.0f} us" if first else "",
                    f"{refit['bound device refit over copy']:.2f}" if first else "",
                    f"{case['under refits']['p99 over idle']:.2f}" if first else "",
                ]
            )
    return _table(SUMMARY, rows)


if __name__ == "__main__":
    render_gpu(Path("benchmarks/results"), Path("README.md"), Path("docs"))
