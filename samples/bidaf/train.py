#!/usr/bin/env python3
"""Train the network of the BiDAF sample on a corpus that preprocess.py made.

An interrupted run (Ctrl-C, a lost machine) goes on with --resume and the same settings. Several trained networks can
teach another one: let each write its soft labels (--write-labels), and name them all with --labels.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from onnx_refit.errors import MissingExtraError, OnnxRefitError
from onnx_refit.files import write_error

try:
    import torch  # noqa: F401 - said here, so that its absence gets one clear line
except ImportError:
    sys.exit(f"error: {MissingExtraError('torch', 'train', 'Training')}")

from onnx_refit.samples.bidaf.training.corpus import Corpus
from onnx_refit.samples.bidaf.training.curve import draw_curve
from onnx_refit.samples.bidaf.training.labels import average_labels, label, save_labels
from onnx_refit.samples.bidaf.training.loop import Trainer, choose_device
from onnx_refit.samples.bidaf.training.settings import Settings
from onnx_refit.samples.bidaf.training.weights import mean_weights


class ConsoleObserver:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.began = time.monotonic()
        columns = [BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn()]
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
        self.task = self.bar.add_task("starting", total=1.0)

    def advance(self, share: float, message: str) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, completed=share, description=message)
        else:
            self.tell(f"{100 * share:5.1f} % {message}")

    def tell(self, message: str) -> None:
        seconds = time.monotonic() - self.began
        self.console.print(f"[{seconds:7.1f} s] {message}", highlight=False, markup=False, soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"), help="of preprocess.py")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of this run")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--init", type=Path, nargs="+", default=[], help="begin with the mean of these weight files")
    parser.add_argument("--labels", type=Path, nargs="+", default=[], help="soft labels of other networks")
    parser.add_argument("--write-labels", type=Path, help="write this network's soft labels at the end")
    group = parser.add_argument_group("settings of the run")
    for field in dataclasses.fields(Settings):
        group.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args()


def train(arguments: argparse.Namespace, observer: ConsoleObserver) -> None:
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    device = choose_device(arguments.device)
    corpus = Corpus.load(arguments.corpus)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(arguments.out, error) from error
    trainer = Trainer(corpus, settings, device, arguments.out, observer)
    observer.tell(f"{len(trainer.train_split)} training and {len(trainer.dev_split)} dev questions on {device}")
    if arguments.init:
        trainer.start_from(mean_weights(arguments.init))
    if arguments.labels:
        trainer.learn_from(average_labels(arguments.labels, trainer.train_split))
    if arguments.resume:
        trainer.resume()
    trainer.run()
    if arguments.write_labels:
        with trainer.averaged() as model:
            save_labels(arguments.write_labels, label(model, trainer.train_split))
        observer.tell(f"wrote {arguments.write_labels}")
    draw_curve([json.loads((arguments.out / "log.json").read_text(encoding="utf8"))], arguments.out / "curve.png")


def main() -> int:
    arguments = parse()
    observer = ConsoleObserver()
    try:
        if observer.console.is_terminal:
            with observer.bar:
                train(arguments, observer)
        else:
            train(arguments, observer)
    except OnnxRefitError as error:
        observer.console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
