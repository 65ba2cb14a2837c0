"""The Open Inference Protocol's gRPC messages, compiled to a descriptor instead of to generated code."""
