"""Compile ``open_inference.proto`` to the descriptor that ``messages`` loads (needs grpcio-tools)."""

from __future__ import annotations

from pathlib import Path

from onnx_refit.errors import MissingExtraError
from onnx_refit.files import write_bytes

HERE = Path(__file__).parent
SOURCE = HERE / "open_inference.proto"
COMPILED = HERE / "open_inference.binpb"


def compile_proto(output: Path) -> None:
    """Write the serialised FileDescriptorSet of the protocol.

    Raises:
        MissingExtraError: grpcio-tools is not installed.
        RuntimeError: protoc refused the file.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise MissingExtraError("grpcio-tools", "serve-test", "compiling the protocol") from error
    code = protoc.main(["protoc", f"--proto_path={HERE}", f"--descriptor_set_out={output}", SOURCE.name])
    if code:
        raise RuntimeError(f"protoc failed with exit code {code}")
    # protoc writes in place; write again so that a reader never sees half of it.
    write_bytes(output, output.read_bytes())


if __name__ == "__main__":
    compile_proto(COMPILED)
