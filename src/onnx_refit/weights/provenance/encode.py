"""Expressions as JSON and back; what comes back is checked as if an enemy had written it."""

from __future__ import annotations

import math
from typing import Any

from onnx_refit.errors import ModelError, WeightsFormatError
from onnx_refit.tensors import dtype_name, is_floating, numpy_dtype
from onnx_refit.weights.provenance.expression import (
    BatchNormFold,
    BiasForm,
    Concat,
    Convert,
    Expression,
    Factor,
    FoldPart,
    Reshape,
    Scale,
    ScaleForm,
    Slice,
    Stored,
    Take,
    Transpose,
)

_MAX_DEPTH = 16
_MAX_PARTS = 4096
_MAX_RANK = 32
_MAX_INDICES = 1_000_000


def expression_to_json(expression: Expression) -> Any:
    """An expression as JSON: a stored tensor is its name, anything else an object with ``op``."""
    match expression:
        case Stored(name):
            return name
        case Reshape(of, shape):
            return {"op": "reshape", "of": expression_to_json(of), "shape": list(shape)}
        case Transpose(of, perm):
            return {"op": "transpose", "of": expression_to_json(of), "perm": list(perm)}
        case Convert(of, dtype):
            return {"op": "convert", "of": expression_to_json(of), "dtype": dtype}
        case Slice(of, axis, start, stop):
            return {"op": "slice", "of": expression_to_json(of), "axis": axis, "start": start, "stop": stop}
        case Concat(parts, axis):
            return {"op": "concat", "parts": [expression_to_json(part) for part in parts], "axis": axis}
        case Take(of, axis, indices):
            return {"op": "take", "of": expression_to_json(of), "axis": axis, "indices": list(indices)}
        case Scale(of, by, how):
            return {"op": "scale", "of": expression_to_json(of), "by": by, "how": how.value}
        case BatchNormFold():
            return {
                "op": "batch-norm",
                "part": expression.part.value,
                "of": None if expression.of is None else expression_to_json(expression.of),
                "gamma": expression.gamma,
                "beta": expression.beta,
                "mean": expression.mean,
                "variance": expression.variance,
                "epsilon": expression.epsilon,
                "axis": expression.axis,
                "scale_form": expression.scale_form.value,
                "bias_form": expression.bias_form.value,
            }


def expression_from_json(value: Any, depth: int = 0) -> Expression:
    """The expression that ``expression_to_json`` wrote; WeightsFormatError for anything else."""
    if isinstance(value, str):
        return Stored(value)
    if not isinstance(value, dict) or depth > _MAX_DEPTH:
        raise WeightsFormatError("no expression of checkpoint tensors")
    try:
        return _decode(value, depth)
    except (KeyError, TypeError, ValueError, ModelError) as error:
        raise WeightsFormatError(f"no expression of checkpoint tensors: {error!r}") from error


def _decode(value: dict[str, Any], depth: int) -> Expression:
    op = value["op"]
    if op == "concat":
        parts = value["parts"]
        if not isinstance(parts, list) or not 1 <= len(parts) <= _MAX_PARTS:
            raise ValueError("parts")
        return Concat(tuple(expression_from_json(part, depth + 1) for part in parts), _whole(value["axis"]))
    of = None if op == "batch-norm" and value["of"] is None else expression_from_json(value["of"], depth + 1)
    if op == "batch-norm":
        return _decode_fold(value, of)
    if of is None:
        raise ValueError("of")
    match op:
        case "reshape":
            return Reshape(of, _wholes(value["shape"]))
        case "transpose":
            perm = _wholes(value["perm"])
            if sorted(perm) != list(range(len(perm))):
                raise ValueError("perm")
            return Transpose(of, perm)
        case "convert":
            dtype = _text(value["dtype"])
            return Convert(of, dtype if is_floating(dtype_name(numpy_dtype(dtype))) else _no_float(dtype))
        case "slice":
            return Slice(of, _whole(value["axis"]), _whole(value["start"]), _whole(value["stop"]))
        case "take":
            return Take(of, _whole(value["axis"]), _wholes(value["indices"], _MAX_INDICES))
        case "scale":
            return Scale(of, _real(value["by"]), Factor(value["how"]))
    raise ValueError(f"op {op!r}")


def _no_float(dtype: str) -> str:
    raise ValueError(f"{dtype} is no floating-point dtype")


def _decode_fold(value: dict[str, Any], of: Expression | None) -> BatchNormFold:
    return BatchNormFold(
        part=FoldPart(value["part"]),
        of=of,
        gamma=None if value["gamma"] is None else _text(value["gamma"]),
        beta=None if value["beta"] is None else _text(value["beta"]),
        mean=_text(value["mean"]),
        variance=_text(value["variance"]),
        epsilon=_real(value["epsilon"]),
        axis=_whole(value["axis"]),
        scale_form=ScaleForm(value["scale_form"]),
        bias_form=BiasForm(value["bias_form"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise TypeError("whole number expected")
    return value


def _wholes(value: Any, most: int = _MAX_RANK) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise TypeError("list of whole numbers expected")
    return tuple(_whole(v) for v in value)


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError("number expected")
    return float(value)
