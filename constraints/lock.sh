#!/bin/sh
# Pin the newest versions of everything with hashes. No index or host is written into the files.
set -eu
cd "$(dirname "$0")"
compile() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --no-header --no-emit-package onnx-refit "$@"
}
# The project itself is listed only for its dependencies.
(cd .. && uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-annotate --no-header --no-emit-package onnx-refit constraints/base.in -o constraints/base.txt)
(cd .. && uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-annotate --no-header --no-emit-package onnx-refit constraints/serve.in -o constraints/serve.txt)
(cd .. && uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-annotate --no-header --no-emit-package onnx-refit constraints/ray.in -o constraints/ray.txt)
compile lint.in -o lint.txt
compile all.in -o all.txt --no-emit-package torch
