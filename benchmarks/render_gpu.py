"""The tables about GPUs in docs/gpu.md and the README, from the result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import table

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
    "derivation on the device",
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


def about(data: Mapping[str, Any]) -> str:
    """What it was measured on."""
    machine = data["machine"]
    packages = machine["packages"]
    return (
        f"One {machine['gpus'][0]}, CUDA {machine['cuda']}, PyTorch {packages['torch']}, "
        f"CuPy {machine['cupy']}; host with {machine['cores']} cores. Medians of interleaved rounds, microseconds."
    )


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _cases(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(_TITLES[name], case) for name, case in data["cases"].items() if "inference" in case]


def session_over_refit(case: Mapping[str, Any]) -> float:
    """The quickest new session of any peer, from weights on the host, over our refit from device memory."""
    built = case["inference"][0]["seconds to build"]
    peers = [value for name, value in built.items() if value and "tf32" not in name and "only" not in name]
    return float(min(peers) / case["refit"]["microseconds"]["refit from bound device weights"] * 1e6)


def gpu_tables(data: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """All GPU figures as Markdown, those of one GPU and those of groups."""
    return "\n\n".join([about(data), *_tables(data, groups)])


def _tables(data: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
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
        table(["model", "input", *(title for _, title in _SHOWN), "over the best"], inference),
        "Other precisions, our network through TorchInductor, and from NumPy to NumPy; errors against the CPU:",
        table(HALVES, halves),
        "The derivation alone (the backend's part: nothing is checked, kept or committed) of all weights, waited "
        "for; in brackets over a plain copy of the same bytes from the same place:",
        table(
            [
                "model",
                "weights, tensors",
                "copy",
                "from bound tensors",
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
        made.append(table(GROUPS, rows))
    return made


REFITS = [
    "model",
    "weights, tensors",
    "copy",
    "bound tensors",
    "the same mapping",
    "new tensors in a new mapping",
    "half of them, partial",
    "from bfloat16",
    "into bfloat16",
    "another order of elements",
    "nothing changed",
]
_CALLS = (
    "bound",
    "mapping",
    "new mapping of new tensors",
    "half of the weights",
    "from bfloat16",
    "into bfloat16",
    "from another order",
    "nothing changed",
)


def refit_tables(data: Mapping[str, Any]) -> str:
    """Whole transactions from a trainer's tensors, as Markdown."""
    rows = []
    for name, title in _TITLES.items():
        case = data["cases"][name]
        us, over = case["microseconds"], case["over a copy"]
        cells = [f"{_us(us[key])} (**{over[key]:.2f}**)" for key in _CALLS[:2]] + [_us(us[key]) for key in _CALLS[2:]]
        rows.append([title, f"{case['bytes'] / 1e6:.0f} MB, {case['tensors']}", _us(us["copy"]), *cells])
    fixed = data["cases"]["fixed"]["microseconds"]
    return "\n\n".join(
        [
            about(data),
            "Whole transactions, `Engine.refit` from the call to its report, from tensors on the device whose values "
            "all changed; in brackets over a plain copy of the same bytes:",
            table(REFITS, rows),
            f"What a refit costs that moves nothing: {fixed['bound, 1']:.0f} us from one bound tensor of a few bytes, "
            f"{fixed['bound, 100']:.0f} us from a hundred ({fixed['mapping, 1']:.0f} us and "
            f"{fixed['mapping, 100']:.0f} us from a mapping); a copy of a few bytes: {fixed['copy']:.0f} us.",
        ]
    )


def refit_summary(data: Mapping[str, Any]) -> str:
    """The README's table of whole transactions."""
    rows = []
    for name, title in _TITLES.items():
        case = data["cases"][name]
        us, over = case["microseconds"], case["over a copy"]
        size = f"{case['bytes'] / 1e6:.0f} MB, {case['tensors']}"
        cells = [f"{us[key]:.0f} us ({over[key]:.2f})" for key in ("bound", "mapping")]
        rows.append([title, size, f"{us['copy']:.0f} us", *cells])
    return table(["model", "weights, tensors", "a plain copy", "refit, bound", "refit, a mapping"], rows)


def summary(data: Mapping[str, Any]) -> str:
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
    return table(SUMMARY, rows)
