"""Weights and checkpoints to find names in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import CheckReport, check
from onnx_refit.tensors import spec_of
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.names import Discovery, find_names
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.provenance.clues import Clues

RNG = np.random.default_rng(1)


def r(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def find(weights: dict[str, Any], checkpoint: dict[str, Any], **uses: str) -> Discovery:
    clues = Clues.of_uses({name: [use] for name, use in uses.items()}) if uses else None
    found = find_names(weights, open_weights(checkpoint), clues)
    view = MappedView(open_weights(checkpoint), found.names)
    for name in found.names.entries:  # whatever was found gives the weight's own bits
        assert view.read(name).tobytes() == np.ascontiguousarray(weights[name]).tobytes()
    again = NameMap.from_json(json.loads(json.dumps(found.names.to_json())))
    assert again == found.names
    return found


A, B, C = r(4, 6), r(4, 6), r(4, 6)


def sources_of(weights: dict[str, Any]) -> list[SourceWeight]:
    return [SourceWeight(spec_of(n, a), ()) for n, a in weights.items()]


def outcome(names: NameMap, weights: dict[str, Any], checkpoint: dict[str, Any]) -> tuple[CheckReport, dict[str, Any]]:
    return check(sources_of(weights), MappedView(open_weights(checkpoint), names))
