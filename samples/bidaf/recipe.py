#!/usr/bin/env python3
"""Train the network that the sample ships: teachers, students of all teachers, and the mean of the students.

Teachers begin from different seeds. Students begin with the weights of the first teacher and learn from the answers
and from what all teachers believe; since they began alike, the mean of their weights is one good network. Runs are
shared out over the GPUs; finished ones are skipped, so that the same command goes on after an interruption.
The shipped weights took 9 minutes on four H200.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")
TEACHER_VARIANTS = (("0.2", "0.0025"), ("0.25", "0.003"), ("0.2", "0.003"), ("0.25", "0.0025"))


@dataclass(frozen=True)
class Run:
    """One call of train.py: the folder it fills, the file that shows that it is finished, and its options."""

    name: str
    finished: Path
    options: tuple[str, ...]


def teachers(arguments: argparse.Namespace) -> list[Run]:
    runs = []
    for number in range(1, arguments.teachers + 1):
        dropout, rate = TEACHER_VARIANTS[(number - 1) % len(TEACHER_VARIANTS)]
        labels = arguments.out / f"teacher-{number}" / "labels.safetensors"
        options: tuple[str, ...] = ("--seed", str(number), "--dropout", dropout, "--learning-rate", rate)
        options += ("--epochs", str(arguments.teacher_epochs), "--write-labels", str(labels))
        runs.append(Run(f"teacher-{number}", labels, options))
    return runs


def students(arguments: argparse.Namespace, taught_by: list[Run]) -> list[Run]:
    runs = []
    for number in range(1, arguments.students + 1):
        name = f"student-{number}"
        first = arguments.out / "teacher-1" / "weights.safetensors"
        options: tuple[str, ...] = ("--seed", f"1{number}", "--init", str(first))
        options += ("--labels", *(str(run.finished) for run in taught_by), "--soft-weight", "0.85")
        options += ("--learning-rate", "0.0012", "--warmup", "300", "--epochs", str(arguments.student_epochs))
        runs.append(Run(name, arguments.out / name / "done", options))
    return runs


def execute(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Run all that is not finished, ``--per-gpu`` at a time on each GPU; exit at the first failure."""
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if not run.finished.exists():
            waiting.put(run)
    failures: list[str] = []

    def work(gpu: int) -> None:
        while not failures:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            folder = arguments.out / run.name
            folder.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                str(TRAIN),
                "--corpus",
                str(arguments.corpus),
                "--out",
                str(folder),
                *run.options,
            ]
            command += [*arguments.extra, *(["--resume"] if (folder / "state.safetensors").exists() else [])]
            print(f"{run.name} on GPU {gpu}", flush=True)
            with (folder / "output.txt").open("ab") as output:
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
                done = subprocess.run(command, check=False, env=environment, stdout=output, stderr=output)
                if done.returncode:
                    failures.append(f"{run.name} failed; see {folder / 'output.txt'}")
                    return
            run.finished.touch()

    workers = [
        threading.Thread(target=work, args=(gpu % arguments.gpus,)) for gpu in range(arguments.gpus * arguments.per_gpu)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        sys.exit("error: " + "; ".join(failures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--out", type=Path, default=Path("recipe"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=2, help="runs at a time on a GPU: one alone does not fill it")
    parser.add_argument("--teachers", type=int, default=8)
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--teacher-epochs", type=float, default=14.2)
    parser.add_argument("--student-epochs", type=float, default=11.8)
    parser.add_argument("extra", nargs="*", help="more options of train.py, after --")
    arguments = parser.parse_args()
    teaching = teachers(arguments)
    execute(teaching, arguments)
    learning = students(arguments, teaching)
    execute(learning, arguments)
    weights = [str(arguments.out / run.name / "weights.safetensors") for run in learning]
    mean = arguments.out / "mean"
    execute([Run("mean", mean / "done", ("--epochs", "0", "--init", *weights))], arguments)
    print(f"the network is {mean / 'weights.safetensors'}")


if __name__ == "__main__":
    main()
