"""Once refits pause, what was kept for a next one is given back; and the next one comes all the same."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_refit
from onnx_refit.refit import retain
from tests.support.models import conv_bn, conv_bn_weights


def test_the_packet_is_freed_when_refits_pause_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 0.0)
    plan = onnx_refit.build(conv_bn())
    x = np.random.default_rng(0).standard_normal([1, 3, 9, 9], np.float32)
    with onnx_refit.load(plan) as engine, onnx_refit.load(plan) as other:
        packet, retainer = engine._derivation._packet, engine._derivation._retainer
        for seed in range(1, 5):
            engine.refit(conv_bn_weights(seed))
            retainer.clear()
            assert not packet.views
            other.refit(conv_bn_weights(seed))
            assert all(
                a.tobytes() == b.tobytes()
                for a, b in zip(*(e.run({"x": x}).values() for e in (engine, other)), strict=True)
            )
            assert engine.fingerprint() == other.fingerprint()
