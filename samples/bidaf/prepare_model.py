"""Step one of the sample: make an original BiDAF model ready for an engine.

    python samples/bidaf/prepare_model.py -d DIR      your own bidaf-9.onnx or bidaf-original.onnx
    python samples/bidaf/prepare_model.py --bundled   the model that comes with the library

The same as ``onnx-refit bidaf prepare``, whose options it takes.
"""

import sys

from onnx_refit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bidaf", "prepare", *sys.argv[1:]]))
