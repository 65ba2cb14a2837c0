"""The embedded CPU engine on ONNX Runtime."""
