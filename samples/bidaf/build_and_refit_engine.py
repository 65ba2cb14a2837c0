"""Step two of the sample: build the engine (or read its plan), refit fake and right weights, check the answers.

    python samples/bidaf/build_and_refit_engine.py

The same as ``onnx-refit bidaf build``, whose options it takes. Run ``prepare_model.py`` first.
"""

import sys

from onnx_refit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bidaf", "build", *sys.argv[1:]]))
