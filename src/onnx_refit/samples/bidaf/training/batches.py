"""The corpus on a device, and batches of it: flat tokens, longest paragraph first, no padding.

A batch of ``B`` examples holds ``2 * B`` sequences one after another: the paragraphs, then the questions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .corpus import Split

__all__ = ["Batch", "DeviceSplit", "epoch_order", "length_order"]

_CHUNK = 40

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples as flat tensors on one device; ``n`` counts the tokens of all sequences, ``c`` those of paragraphs.

    Attributes:
        examples: int64 [B] on the host, rows of the split, longest paragraph first.
        lengths: int64 [2 * B] on the host, words of each sequence.
        context_tokens: c.
        types: int32 [n].
        sequence: int64 [n], the sequence of each token.
        offsets: int32 [2 * B + 1], where each sequence starts.
        padded_place: int64 [n], the token's place in the paragraphs padded to [B, T] followed by the questions
            padded to [B, J].
        context_length: int64 [B].
        question_length: int64 [B].
        start: int64 [B], the answer's first word, -1 if unknown.
        end: int64 [B], its last word, -1 if unknown.
        label_place: int64 [c], the token's row in the soft labels of the split.
    """

    examples: Indices
    lengths: Indices
    context_tokens: int
    types: Any
    sequence: Any
    offsets: Any
    padded_place: Any
    context_length: Any
    question_length: Any
    start: Any
    end: Any
    label_place: Any

    @property
    def size(self) -> int:
        """B."""
        return len(self.examples)

    @property
    def longest_context(self) -> int:
        """T."""
        return int(self.lengths[: self.size].max())

    @property
    def longest_question(self) -> int:
        """J."""
        return int(self.lengths[self.size :].max())


class DeviceSplit:
    """A split of the corpus on a device, cut into batches without a copy of text from the host.

    Args:
        split: the data.
        device: where batches are wanted.
        limit: keep only the first examples, if positive.
    """

    def __init__(self, split: Split, device: Any, limit: int = 0) -> None:
        count = min(limit, len(split)) if limit > 0 else len(split)
        self.device = device
        self.paragraph = split.paragraph[:count].astype(np.int64)
        context_offsets = split.context_offsets.astype(np.int64)
        question_offsets = split.question_offsets.astype(np.int64) + len(split.contexts)
        self.context_start = context_offsets[self.paragraph]
        self.context_length = context_offsets[self.paragraph + 1] - self.context_start
        self.question_start = question_offsets[:count]
        self.question_length = question_offsets[1 : count + 1] - self.question_start
        self.start, self.end = split.start[:count].astype(np.int64), split.end[:count].astype(np.int64)
        self.label_start = np.cumsum(self.context_length) - self.context_length
        self._types = torch.from_numpy(np.concatenate([split.contexts, split.questions])).to(device)

    def __len__(self) -> int:
        return len(self.paragraph)

    @property
    def label_rows(self) -> int:
        """Words of all paragraphs, one paragraph an example: the rows of soft labels."""
        return int(self.context_length.sum())

    def batch(self, examples: Indices) -> Batch:
        """Lay out some examples; they come back in order of falling paragraph length."""
        examples = examples[np.argsort(-self.context_length[examples], kind="stable")]
        size = len(examples)
        contexts, questions = self.context_length[examples], self.question_length[examples]
        lengths = np.concatenate([contexts, questions])
        ends = np.cumsum(lengths)
        offsets = np.concatenate([[0], ends])
        longest, longest_question = contexts.max(), questions.max()
        numbers = np.arange(size)
        parts = [
            lengths,
            np.concatenate([self.context_start[examples], self.question_start[examples]]),
            np.concatenate([numbers * longest, size * longest + numbers * longest_question]),
            offsets,
            self.label_start[examples],
            self.start[examples],
            self.end[examples],
        ]
        lengths_, source, base, offsets_, label_start, start, end = self._send(parts)
        total, context_tokens = int(ends[-1]), int(ends[size - 1])
        sequence = torch.repeat_interleave(lengths_, output_size=total)
        within = torch.arange(total, device=self.device) - offsets_[:-1].index_select(0, sequence)
        context_sequence = sequence[:context_tokens]
        return Batch(
            examples=examples,
            lengths=lengths,
            context_tokens=context_tokens,
            types=self._types.index_select(0, source.index_select(0, sequence) + within),
            sequence=sequence,
            offsets=offsets_.int(),
            padded_place=base.index_select(0, sequence) + within,
            context_length=lengths_[:size],
            question_length=lengths_[size:],
            start=start,
            end=end,
            label_place=label_start.index_select(0, context_sequence) + within[:context_tokens],
        )

    def _send(self, parts: list[Indices]) -> Any:
        """Move small host arrays to the device in one copy."""
        joined = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if self.device.type == "cuda":
            joined = joined.pin_memory().to(self.device, non_blocking=True)
        return joined.split([len(part) for part in parts])


def epoch_order(lengths: Indices, batch: int, seed: int, epoch: int) -> list[Indices]:
    """Batches of one epoch: random, but of examples of like length. The same seed and epoch give the same order."""
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    batches: list[Indices] = []
    for low in range(0, len(shuffled), batch * _CHUNK):
        chunk = shuffled[low : low + batch * _CHUNK]
        chunk = chunk[np.argsort(lengths[chunk] + random.random(len(chunk)), kind="stable")]
        batches.extend(chunk[place : place + batch] for place in range(0, len(chunk), batch))
    return [batches[number] for number in random.permutation(len(batches))]


def length_order(lengths: Indices, batch: int) -> Iterator[Indices]:
    """Yield all examples, longest first, in batches of about ``batch`` paragraphs of 250 words."""
    order = np.argsort(-lengths, kind="stable")
    place = 0
    while place < len(order):
        count = max(1, min(4 * batch, batch * 250 // int(lengths[order[place]])))
        yield order[place : place + count]
        place += count
