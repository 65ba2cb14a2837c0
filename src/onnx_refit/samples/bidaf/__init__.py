"""The BiDAF sample: engine refitting of ONNX models."""
