"""Mutated checkpoints are read right or refused with our own error: no crash, no hang, no memory, no way out.

The default suite tries a few thousand; ``ONNX_REFIT_FUZZ=100000`` tries as many as asked for.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as reference_load
from safetensors.numpy import save

from onnx_refit.errors import OnnxRefitError
from onnx_refit.weights.open import open_path
from onnx_refit.weights.source import read_all
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from tests.weights.source_support import onnx_model

COUNT = int(os.environ.get("ONNX_REFIT_FUZZ", "1500"))
ARRAYS: dict[str, Any] = {
    "layer.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "layer.bias": np.ones(6, np.float16),
    "steps": np.array(3),
    "mask": np.array([True, False, True]),
}


def seeds(directory: Path) -> dict[str, bytes]:
    np.savez(directory / "stored.npz", **ARRAYS)
    np.savez_compressed(directory / "packed.npz", **ARRAYS)
    onnx.save(onnx_model(), directory / "model.onnx")
    (directory / "tensors.safetensors").write_bytes(save(ARRAYS, {"format": "np"}))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B, 0x2F, 0x2E]
SPLICES = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"9" * 30,
    b"../../../etc/passwd",
    b"[[[[[[",
    b'{"',
    struct.pack("<Q", 1 << 40),
    b"\x80\x04c",
]


def mutate(data: bytes, generator: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a piece cut, doubled, moved or replaced; mostly near the start or end."""
    result = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        if not result:
            break
        at = generator.randrange(len(result))
        if generator.random() < 0.3:
            at = min(at, generator.randrange(min(400, len(result))))
        kind = generator.randrange(8)
        size = generator.choice([1, 2, 4, 8, 40])
        if kind == 0:
            result[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            result[at] = generator.choice(INTERESTING)
        elif kind == 2:
            result[at] = generator.randrange(256)
        elif kind == 3:
            del result[at : at + size]
        elif kind == 4:
            result[at:at] = result[at : at + size]
        elif kind == 5:
            result[at : at + size] = generator.randbytes(size)
        elif kind == 6:
            del result[at:]
        else:
            splice = generator.choice(SPLICES)
            result[at : at + generator.choice([0, len(splice)])] = splice
    return bytes(result)


def attempt(path: Path) -> dict[str, Any] | None:
    """All tensors of a checkpoint, or None where it is refused with our error and with a hint of where."""
    try:
        source = open_path(path)
        try:
            found = dict(read_all(source))
        finally:
            source.close()
    except OnnxRefitError as error:
        assert str(error)
        return None
    for name, array in found.items():
        assert source.specs[name].shape == array.shape
    return found


def right_npz(found: dict[str, Any], data: bytes) -> None:
    for name, array in found.items():
        original = ARRAYS.get(name)
        if original is not None and (array.shape, array.dtype) == (original.shape, original.dtype):
            assert array.tobytes() == original.tobytes()  # checksums are verified


def right_safetensors(found: dict[str, Any], data: bytes) -> None:
    """What we accept, the format's own library accepts too and reads alike."""
    reference = reference_load(data)
    assert {n: a.tobytes() for n, a in reference.items()} == {n: a.tobytes() for n, a in found.items()}


def right_onnx(found: dict[str, Any], data: bytes) -> None:
    for array in found.values():
        assert array.size * array.itemsize < len(data) * 8 or 0 in array.strides


CHECKS: dict[str, Callable[[dict[str, Any], bytes], None]] = {
    "stored.npz": right_npz,
    "packed.npz": right_npz,
    "model.onnx": right_onnx,
    "tensors.safetensors": right_safetensors,
}


@pytest.mark.parametrize("name", CHECKS)
def test_mutated_files(tmp_path: Path, name: str) -> None:
    data = seeds(tmp_path)[name]
    before = {p.name for p in tmp_path.iterdir()}
    found = attempt(tmp_path / name)
    assert found is not None
    CHECKS[name](found, data)
    path = tmp_path / name
    generator = random.Random(20261122)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0
    slowest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(COUNT // len(CHECKS) if COUNT > 10_000 else COUNT):
            bad = mutate(data, generator)
            path.write_bytes(bad)
            started = time.thread_time()  # of this thread, whoever else is at work on the machine
            found = attempt(path)
            slowest = max(slowest, time.thread_time() - started)
            if found is not None:
                accepted += 1
                CHECKS[name](found, bad)
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kilobytes
    assert {p.name for p in tmp_path.iterdir()} == before
    assert accepted < COUNT  # the mutations do bite


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F8_E4M3", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=max(200, COUNT // 20), deadline=None, suppress_health_check=list(HealthCheck))
@given(header=st.dictionaries(st.text(max_size=4), entry | json_values, max_size=4), size=st.integers(0, 40))
def test_any_json_header(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(range(size))
    path.write_bytes(data)
    found = attempt(path)
    if found is not None:
        right_safetensors(found, data)


@settings(max_examples=max(200, COUNT // 20), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".safetensors", ".npz", ".onnx", "", ".index.json"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    attempt(path)


@pytest.mark.slow
def test_two_gigabytes_are_mapped_not_loaded(tmp_path: Path) -> None:
    """Checking and reading a large file takes no more memory of one's own than one tensor."""
    from onnx_refit.plan.compiled import SourceWeight
    from onnx_refit.refit.check import check

    path = tmp_path / "big.safetensors"
    count, size = 32, 64 << 20
    header = {
        f"w{i}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).random(size // 4, np.float32).tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(block)
    child = os.fork()
    if child == 0:  # a process of its own, so that nobody else's memory counts
        try:
            before = _private_kilobytes()
            source = SafetensorsSource(path)
            report, arrays = check([SourceWeight(spec, ()) for spec in source.specs.values()], source)
            held = _private_kilobytes() - before
            os._exit(0 if report.ok and len(arrays) == count and held < size >> 10 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def _private_kilobytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0
