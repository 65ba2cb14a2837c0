"""Write trained weights as the original model of the sample: ONNX, opset 9, string inputs.

    python samples/bidaf/export.py -o bidaf-original.onnx                              the weights of the library
    python samples/bidaf/export.py -o bidaf-original.onnx --checkpoint my.safetensors  your own

The same as ``onnx-refit bidaf export``, whose options it takes.
"""

import sys

from onnx_refit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bidaf", "export", *sys.argv[1:]]))
