"""One training run: steps, scores, snapshots, checkpoints and the log, in a folder of its own."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ..metric import Score
from .batches import Batch, DeviceSplit, epoch_order
from .corpus import Corpus
from .errors import DataError, DeviceError, TrainingError
from .evaluation import evaluate
from .files import write_json, write_tensors
from .labels import soft_loss
from .model import Bidaf, Dropouts
from .settings import SNAPSHOTS, Settings
from .state import Progress, read_state, write_state

__all__ = ["Observer", "Trainer", "choose_device"]

_LOG_STEPS = 100
_CLOSING_SECONDS = 8.0


class Observer(Protocol):
    """Whoever shows how a run goes."""

    def advance(self, share: float, message: str) -> None:
        """Hear that ``share`` (0 to 1) of the run is done."""

    def tell(self, message: str) -> None:
        """Hear of an event."""


def choose_device(name: str) -> Any:
    """Return the torch device ``name`` (``cpu``, ``cuda``, ``cuda:1``).

    Raises:
        DeviceError: it is not there.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.empty(1, device=device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"the device {name!r} cannot be used ({str(error).splitlines()[0]})",
            hint="Train on a machine with an NVIDIA GPU; --device cpu is for trying out a few examples.",
        ) from error
    return device


class Trainer:
    """Train the network on a corpus.

    Args:
        corpus: the data.
        settings: see :class:`.settings.Settings`.
        device: of :func:`choose_device`.
        folder: receives ``weights.safetensors`` (averaged, float16), ``snapshot-N.safetensors`` (without the frozen
            words), ``state.safetensors`` and ``log.json``.
        observer: shows how it goes.
    """

    def __init__(self, corpus: Corpus, settings: Settings, device: Any, folder: Path, observer: Observer) -> None:
        self.corpus, self.settings, self.folder, self.observer = corpus, settings, folder, observer
        self.train_split = DeviceSplit(corpus.train, device, settings.limit)
        self.dev_split = DeviceSplit(corpus.dev, device, settings.dev_limit)
        if not len(self.train_split):
            raise DataError("the corpus holds no training examples")
        torch.manual_seed(settings.seed)
        dropouts = Dropouts(settings.dropout, settings.unknown_dropout)
        self.model = Bidaf(corpus, settings.char_size, dropouts).to(device)
        self.progress = Progress()
        self._labels: Any = None
        self._names = [name for name, _ in self.model.named_parameters()]
        self._parameters = [parameter for _, parameter in self.model.named_parameters()]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        words = [self.model.word_tuned]
        rest = [parameter for name, parameter in self.model.named_parameters() if name != "word_tuned"]
        self._scales = (1.0, settings.word_rate)
        self._optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": words}],
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )

    def start_from(self, weights: Any) -> None:
        """Begin with trained weights (as :meth:`.model.Bidaf.export` names them) instead of random ones."""
        self.model.load(weights)
        with torch.no_grad():
            torch._foreach_copy_(self._average, self._parameters)

    def learn_from(self, labels: Any) -> None:
        """Use soft labels, float16 [label rows, 2] on the device, with the weight that the settings give."""
        self._labels = labels

    def resume(self) -> None:
        """Go on where the folder's checkpoint stopped.

        Raises:
            StateError: there is none, or it is damaged or of other settings.
        """
        average = dict(zip(self._names, self._average, strict=True))
        self.progress = read_state(
            self.folder / "state.safetensors", self.model, average, self._optimizer, self.settings.as_dict()
        )
        self.observer.tell(f"resumed at step {self.progress.step}")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that one pass over the training examples takes."""
        return math.ceil(len(self.train_split) / self.settings.batch)

    def run(self, stop_after: int | None = None) -> Score:
        """Train to the end of the schedule and return the final score of what was written.

        Args:
            stop_after: leave (with a checkpoint) after this many steps in total, as an interruption would.

        Raises:
            WriteError: a file cannot be written.
            TrainingError: the loss is no longer finite.
        """
        total = int(self.settings.epochs * self.steps_per_epoch)
        began = time.monotonic() - self.progress.seconds
        self.progress.log["settings"] = self.settings.as_dict()
        self.progress.log["sessions"].append({"first_step": self.progress.step, **self._machine()})
        self.model.train()
        loss_sum = torch.zeros((), device=self.train_split.device)
        logged, logged_at = self.progress.step, time.monotonic()
        next_score = self._next_score()
        try:
            for batch in self._batches(total):
                self.progress.seconds = time.monotonic() - began
                share = self._share(total)
                if share >= 1:
                    break
                loss_sum += self._step(batch, share)
                step = self.progress.step
                if step % _LOG_STEPS == 0:
                    now = time.monotonic()
                    rate = (step - logged) / max(1e-9, now - logged_at)
                    self._log_loss(float(loss_sum) / (step - logged), rate, share)
                    loss_sum.zero_()
                    logged, logged_at = step, now
                if self.progress.snapshots < len(SNAPSHOTS) and share >= SNAPSHOTS[self.progress.snapshots]:
                    self._snapshot()
                if step >= next_score:
                    self._score("dev")
                    next_score = self._next_score()
                if step % self.settings.state_every == 0:
                    self._save_state()
                if step == stop_after:
                    break
        except KeyboardInterrupt:
            self._save_state()
            self.observer.tell(f"interrupted at step {self.progress.step}; the checkpoint is written")
            raise
        self.progress.seconds = time.monotonic() - began
        self._save_state()
        return self._finish()

    @contextmanager
    def averaged(self, *, as_stored: bool = False) -> Iterator[Bidaf]:
        """Lend the network with its averaged weights; ``as_stored``: rounded to float16 as in the file."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        average = [value.half().float() for value in self._average] if as_stored else self._average
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, average)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)

    def _batches(self, total: int) -> Iterator[Batch]:
        """Yield the batches from the current step to ``total``, the next one laid out while the last one trains."""
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for step in range(self.progress.step, total):
                epoch, place = divmod(step, self.steps_per_epoch)
                if place == 0 or waiting is None:
                    order = epoch_order(self.train_split.context_length, self.settings.batch, self.settings.seed, epoch)
                    waiting = pool.submit(self.train_split.batch, order[place])
                batch = waiting.result()
                if place + 1 < len(order):
                    waiting = pool.submit(self.train_split.batch, order[place + 1])
                yield batch

    def _share(self, total: int) -> float:
        share = self.progress.step / total if total else 1.0
        if self.settings.minutes > 0:
            share = max(share, self.progress.seconds / max(1.0, self.settings.minutes * 60 - _CLOSING_SECONDS))
        return share

    def _step(self, batch: Batch, share: float) -> Any:
        settings = self.settings
        rise = min(1.0, (self.progress.step + 1) / max(1, settings.warmup))
        fall = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * share))
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = settings.learning_rate * rise * fall * scale
        loss = self._loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, settings.clip, foreach=True)
        self._optimizer.step()
        self.progress.step += 1
        decay = min(settings.average, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1 - decay)
        return loss.detach()

    def _loss(self, batch: Batch) -> Any:
        start, end = self.model(batch)
        weight = self.settings.soft_weight if self._labels is not None else 0.0
        loss = 0.0
        if weight < 1:
            loss = (1 - weight) * (F.cross_entropy(start, batch.start) + F.cross_entropy(end, batch.end))
        if weight > 0:
            wanted = self._labels.index_select(0, batch.label_place).float()
            place = batch.padded_place[: batch.context_tokens]
            loss = loss + weight * (soft_loss(start, wanted[:, 0], place) + soft_loss(end, wanted[:, 1], place))
        return loss

    def _log_loss(self, loss: float, rate: float, share: float) -> None:
        step = self.progress.step
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} before step {step}",
                hint="Resume from the last checkpoint with another seed, or lower the learning rate.",
            )
        self.progress.log["train"].append([step, round(loss, 4), round(rate, 2), round(self.progress.seconds, 1)])
        epoch = step / self.steps_per_epoch
        self.observer.advance(share, f"epoch {epoch:.2f} step {step} loss {loss:.4f} {rate:.0f} steps/s")

    def _next_score(self) -> int:
        every = max(1, int(self.settings.evaluate_every * self.steps_per_epoch))
        return (self.progress.step // every + 1) * every

    def _score(self, kind: str, **more: Any) -> Score:
        with self.averaged() as model:
            score = evaluate(model, self.corpus, self.dev_split)
        entry = {"step": self.progress.step, "exact_match": round(score.exact_match, 3), "f1": round(score.f1, 3)}
        self.progress.log[kind].append(entry | more)
        self.observer.tell(f"step {self.progress.step}: exact match {score.exact_match:.2f}, F1 {score.f1:.2f}")
        return score

    def _snapshot(self) -> None:
        self.progress.snapshots += 1
        name = f"snapshot-{self.progress.snapshots}.safetensors"
        score = self._score("snapshots", file=name)
        self._write_weights(self.folder / name, score, frozen_words=False)
        write_json(self.folder / "log.json", self.progress.log)

    def _write_weights(self, path: Path, score: Score, *, frozen_words: bool) -> None:
        with self.averaged() as model:
            weights = model.export(frozen_words=frozen_words)
        metadata = {
            "model": "BiDAF",
            "step": str(self.progress.step),
            "seed": str(self.settings.seed),
            "exact_match": f"{score.exact_match:.3f}",
            "f1": f"{score.f1:.3f}",
        }
        write_tensors(path, {name: value.astype(np.float16) for name, value in weights.items()}, metadata)

    def _save_state(self) -> None:
        average = dict(zip(self._names, self._average, strict=True))
        path = self.folder / "state.safetensors"
        write_state(path, self.model, average, self._optimizer, self.progress, self.settings.as_dict())
        write_json(self.folder / "log.json", self.progress.log)

    def _finish(self) -> Score:
        with self.averaged(as_stored=True) as model:
            score = evaluate(model, self.corpus, self.dev_split)
        self._write_weights(self.folder / "weights.safetensors", score, frozen_words=True)
        self.progress.log["final"] = {
            "step": self.progress.step,
            "exact_match": round(score.exact_match, 3),
            "f1": round(score.f1, 3),
            "seconds": round(self.progress.seconds, 1),
        }
        write_json(self.folder / "log.json", self.progress.log)
        self.observer.tell(f"final: exact match {score.exact_match:.2f}, F1 {score.f1:.2f}")
        return score

    def _machine(self) -> dict[str, str]:
        device = self.train_split.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {"device": name, "torch": str(torch.__version__)}
