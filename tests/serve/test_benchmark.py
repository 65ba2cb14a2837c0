"""What the serving benchmark makes of its measurements; the measurements themselves belong to ``make bench``."""

import numpy as np
import pytest

pytest.importorskip("orjson")
from benchmarks.render_serving import serving_tables
from benchmarks.serving_commits import _figures

pytestmark = pytest.mark.serve


def test_requests_near_a_push_are_told_apart():
    starts = np.arange(0.0, 100.0, 0.01)
    seconds = np.full(len(starts), 0.001)
    pushes = [(before, before + 0.2) for before in np.arange(10.0, 90.0, 2.0)]
    slow = np.zeros(len(starts), bool)
    for before, after in pushes:
        # Begun before the push and still running, or begun within the tenth of a second after it.
        slow |= (starts > before - 0.0095) & (starts < after + 0.05)
    seconds[slow] = 0.01
    figures = _figures(starts, seconds, pushes)
    assert figures["idle_p99"] == pytest.approx(0.001)
    assert figures["near_p99"] == pytest.approx(0.01)
    assert figures["p99"] == pytest.approx(0.01)
    assert figures["p99_over_idle"] == pytest.approx(10)
    assert 0.1 < figures["near_share"] < 0.15


def test_the_tables_name_the_best_peer_and_failures():
    def row(rps, failed=0.0):
        return {"rps": rps, "p50": 0.001, "p99": 0.0025, "failed": failed}

    by_clients = {
        "1": {"onnx-refit": row(300), "onnx-refit, batches": row(200), "A": row(100), "B": row(200)},
        "8": {"onnx-refit": row(300), "onnx-refit, batches": row(600, 2.0), "A": row(400), "B": row(200)},
    }
    clients = {
        "1": {
            "idle_p50": 0.001, "idle_p99": 0.002, "p50": 0.001, "p99": 0.0024, "near_p99": 0.005,
            "near_share": 0.1, "rps": 10.0, "failed": 0.0, "p99_over_idle": 1.2,
            "p99_over_idle_rounds": [1.1, 1.2, 1.3],
        }
    }  # fmt: skip
    ways = {"w": {"title": "this way", "times": 7, "seconds": 0.05, "clients": clients}}
    commits = {"ways": ways, "seconds_a_round": 9, "rounds": 3, "load_before": 0.5}
    text = serving_tables(
        {
            "machine": {"cores": 2, "processor": "P", "python": "3"}, "peers": {"a": "1"},
            "cases": {"tiny": {"title": "T", "rounds": 3, "load_before": 0.5, "forms": {"json": by_clients}}},
            "commits": commits,
        }
    )  # fmt: skip
    assert "| B | **200**, 1 / 2.5 | 200, 1 / 2.5 |" in text
    assert "| A | 100, 1 / 2.5 | **400**, 1 / 2.5 |" in text
    assert "600, 1 / 2.5 (2 failed)" in text
    assert "| our better one / best peer | 1.50 | 1.50 |" in text
    assert "| this way | 1 | 1 / 2 | 1 / 2.4 | **1.20** (1.10 to 1.30) |" in text
    assert "7 times 50 ms" in text
