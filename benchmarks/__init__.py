"""What onnx-refit costs, beside what people do today: paired measurements in one process."""
