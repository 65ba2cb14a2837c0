#!/bin/sh
# Pin the newest versions of everything with hashes. No index or host is written into the files.
set -eu
cd "$(dirname "$0")/.."
compile() {
    uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --no-header --no-emit-package onnx-refit "constraints/$1.in" -o "constraints/$1.txt" ${2:+"$2" "$3"}
}
# base comes first: lint and all are installed on top of it. The project itself is listed only for its dependencies.
compile base
compile serve
compile ray
compile lint
compile all --no-emit-package torch
