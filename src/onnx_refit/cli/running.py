"""``run`` and ``bench``: inferences on a plan."""

from __future__ import annotations

import statistics
import time
import zipfile
from pathlib import Path

import click
import numpy as np

from onnx_refit import api
from onnx_refit.cli.output import (
    counted,
    emit_json,
    human_bytes,
    json_option,
    refuse_overwrite,
    say,
    shape_text,
    spinner,
    table,
)
from onnx_refit.cli.plans import PATH
from onnx_refit.cli.weights import open_source
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.errors import InputError
from onnx_refit.files import atomic_write, read_error
from onnx_refit.plan.plan import Plan
from onnx_refit.tensors import Array, TensorSpec, is_extension, numpy_dtype


def read_inputs(path: Path) -> dict[str, Array]:
    """The arrays of an npz file, never unpickling; ReadError or InputError if it cannot be read."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not hasattr(loaded, "files"):
            raise InputError("it holds one array, not named ones (npy, not npz)", where=path)
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            "this is no npz file of plain arrays", where=path, hint="Write one with numpy.savez(PATH, NAME=array, ...)"
        ) from error


def write_outputs(path: Path, outputs: dict[str, Array]) -> None:
    """Write arrays as npz, atomically: strings as fixed-width text (no pickle), bfloat16 and float8 as float32."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, value in outputs.items():
            if value.dtype.kind == "O":
                value = value.astype(np.str_)
            elif is_extension(value.dtype):  # npz knows neither bfloat16 nor float8; float32 holds both
                value = value.astype(np.float32)
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(value), allow_pickle=False)


@click.command("run")
@click.argument("plan", type=PATH)
@click.option("--input", "input_path", type=PATH, required=True, help="An npz file with one array an input.")
@click.option("--weights", type=str, help="A checkpoint to refit with before the inference.")
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the outputs (npz).")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of the engine; 0 chooses.")
@json_option
def run_command(plan: Path, input_path: Path, weights: str | None, output: Path, threads: int, as_json: bool) -> None:
    """Run one inference of PLAN on the arrays of an npz file."""
    refuse_overwrite(output, input_path, plan)
    inputs = read_inputs(input_path)
    source = None if weights is None else open_source(weights)
    with api.load(plan, weights=source, options=EngineOptions(threads=threads)) as engine:
        started = time.perf_counter()
        outputs = engine.run(inputs)
        seconds = time.perf_counter() - started
    write_outputs(output, outputs)
    shapes = {name: {"dtype": str(value.dtype), "shape": list(value.shape)} for name, value in outputs.items()}
    if as_json:
        emit_json({"output": str(output), "seconds": seconds, "version": outputs.version, "outputs": shapes})
        return
    rows = [(name, value.dtype, shape_text(value.shape)) for name, value in outputs.items()]
    table(f"{counted(len(rows), 'output')} in {seconds * 1e3:.2f} ms", ["name", "dtype", "shape"], rows)
    say(f"wrote {output}")


def example_inputs(inputs: tuple[TensorSpec, ...], dimension: int, seed: int = 0) -> dict[str, Array]:
    """Random inputs of the declared dtypes; dynamic dimensions become ``dimension``."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for spec in inputs:
        if spec.shape is None:
            raise InputError("its rank is unknown, so no example can be made", where=f"input {spec.name!r}")
        shape = [d if isinstance(d, int) else dimension for d in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if dtype.kind in "iub":
            made[spec.name] = rng.integers(0, 2, shape).astype(dtype)
        elif dtype.kind == "O":
            made[spec.name] = np.full(shape, "", object)
        else:
            made[spec.name] = rng.standard_normal(shape).astype(dtype)
    return made


@click.command("bench")
@click.argument("plan", type=PATH)
@click.option("--input", "input_path", type=PATH, help="An npz file with the inputs; random ones by default.")
@click.option("--dimension", type=click.IntRange(1), default=16, show_default=True, help="Size of dynamic dimensions.")
@click.option("--repeats", type=click.IntRange(3), default=30, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of the engine; 0 chooses.")
@json_option
def bench_command(
    plan: Path, input_path: Path | None, dimension: int, repeats: int, threads: int, as_json: bool
) -> None:
    """Measure PLAN here: load, inference, refit, and a plain copy of the same bytes beside it (medians)."""
    opened = Plan.load(plan)
    inputs = read_inputs(input_path) if input_path else example_inputs(opened.inputs, dimension)
    with spinner(f"measuring {plan}", quiet=as_json):
        started = time.perf_counter()
        with api.load(opened, options=EngineOptions(threads=threads)) as engine:
            load_seconds = time.perf_counter() - started
            engine.full_speed.wait()
            first = {name: np.array(engine.weights().read(name)) for name in engine.refittable}
            # Two sets that differ everywhere: weights that a refit does not change would not be written.
            other = {
                name: array[tuple(slice(None, None, -1) for _ in array.shape)].copy() for name, array in first.items()
            }
            copies = {name: np.empty_like(array) for name, array in first.items()}
            infer, refit, copy = [], [], []
            for turn in range(repeats):
                weights = first if turn % 2 else other
                started = time.perf_counter()
                for name, array in weights.items():
                    np.copyto(copies[name], array)
                copy.append(time.perf_counter() - started)
                started = time.perf_counter()
                report = engine.refit(weights)
                refit.append(time.perf_counter() - started)
                report.full_speed.wait()
                engine.run(inputs)
                started = time.perf_counter()
                engine.run(inputs)
                infer.append(time.perf_counter() - started)
    result = {
        "plan": str(plan),
        "weight_bytes": opened.weight_bytes,
        "load_seconds": load_seconds,
        "inference_seconds": statistics.median(infer),
        "refit_seconds": statistics.median(refit),
        "copy_seconds": statistics.median(copy),
        "refit_over_copy": statistics.median(refit) / max(statistics.median(copy), 1e-9),
    }
    if as_json:
        emit_json(result)
        return
    rows = [
        ("load", f"{load_seconds * 1e3:.2f} ms"),
        ("inference", f"{statistics.median(infer) * 1e3:.3f} ms"),
        ("refit", f"{statistics.median(refit) * 1e3:.3f} ms"),
        ("plain copy of the weights", f"{statistics.median(copy) * 1e3:.3f} ms"),
        ("refit over copy", f"{result['refit_over_copy']:.2f}"),
    ]
    table(f"{plan}, {human_bytes(opened.weight_bytes)} of weights", ["", "median"], rows, right=(1,))
