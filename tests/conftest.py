"""How Hypothesis chooses examples, for the whole suite."""

from __future__ import annotations

import os

try:
    from hypothesis import settings
except ImportError:  # the environment of the Ray tests has none, and needs none
    pass
else:
    # The same examples at every run: what one run passes, the next one passes. No deadline: machines are busy.
    settings.register_profile("same", deadline=None, derandomize=True)
    settings.register_profile("random", deadline=None, print_blob=True)
    settings.load_profile("random" if os.environ.get("ONNX_REFIT_RANDOM") else "same")
