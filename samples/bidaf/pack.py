#!/usr/bin/env python3
"""Pack trained weights and earlier checkpoints of their training for shipping, each scored as it will be read."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from onnx_refit.errors import MissingExtraError, OnnxRefitError

try:
    import torch  # noqa: F401 - said here, so that its absence gets one clear line
except ImportError:
    sys.exit(f"error: {MissingExtraError('torch', 'train', 'Scoring what is packed')}")

from onnx_refit.samples.bidaf import checkpoints
from onnx_refit.samples.bidaf.training.batches import DeviceSplit
from onnx_refit.samples.bidaf.training.corpus import Corpus
from onnx_refit.samples.bidaf.training.evaluation import evaluate
from onnx_refit.samples.bidaf.training.files import write_json
from onnx_refit.samples.bidaf.training.loop import choose_device
from onnx_refit.samples.bidaf.training.model import Bidaf, Weights
from onnx_refit.samples.bidaf.training.pack import encode, write_checkpoint, write_trained, write_vocabulary
from onnx_refit.samples.bidaf.training.weights import mean_weights


def read(path: Path, words: int) -> Weights:
    """Read weights; a corpus of fewer words (a lower --glove-rank) drops the last rows of the word table."""
    weights = mean_weights([path])
    return weights | {"word_emb": weights["word_emb"][:words]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--weights", type=Path, required=True, help="the trained weights")
    parser.add_argument(
        "--earlier", nargs="*", default=[], metavar="NAME=FILE", help="checkpoints before them, in order"
    )
    parser.add_argument("--out", type=Path, default=checkpoints.DATA)
    parser.add_argument("--device", default="cuda", help="where the scores are computed")
    parser.add_argument("--dev-limit", type=int, default=0, help="score the first dev questions only")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        corpus = Corpus.load(arguments.corpus)
        device = choose_device(arguments.device)
        split = DeviceSplit(corpus.dev, device, arguments.dev_limit)
        model = Bidaf(corpus).to(device)
        arguments.out.mkdir(parents=True, exist_ok=True)
        final = read(arguments.weights, len(corpus.words))
        index = []
        for entry in [*arguments.earlier, f"{checkpoints.FINAL}={arguments.weights}"]:
            name, _, source = entry.partition("=")
            weights = read(Path(source), len(corpus.words))
            if name == checkpoints.FINAL:
                file = "weights.safetensors"
                metadata = {"model": "BiDAF", "licence": "CC-BY-SA-4.0"}
                write_trained(arguments.out / file, weights, metadata)
                model.load(weights)
            else:
                file = f"{name}.safetensors.xz"
                weights["word_emb"] = weights["word_emb"][: corpus.tuned]
                write_checkpoint(arguments.out / file, weights, final)
                model.load(checkpoints.decode(encode(weights, final), final))
            score = evaluate(model, corpus, split)
            console.log(f"{name}: {score}")
            index.append(
                {"name": name, "file": file, "exact_match": round(score.exact_match, 2), "f1": round(score.f1, 2)}
            )
        write_vocabulary(arguments.out, corpus)
        write_json(arguments.out / "checkpoints.json", index)
    except OnnxRefitError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
