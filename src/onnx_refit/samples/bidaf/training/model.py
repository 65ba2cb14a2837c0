"""BiDAF (Seo et al., arXiv 1611.01603) in PyTorch, over flat sequences without padding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from .batches import Batch
from .corpus import Corpus
from .errors import StateError
from .fused_lstm import available, bidirectional_lstm

__all__ = ["HIDDEN", "Bidaf", "Dropouts", "Weights"]

HIDDEN = 100
_FILTERS = 100
_WIDTH = 5
_OUTSIDE = -1e30

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Dropouts:
    """How much is left out while training.

    Attributes:
        layer: share of features, one mask a sequence before each LSTM (variational dropout).
        unknown: share of untrained words that are read as the unknown word.
    """

    layer: float = 0.2
    unknown: float = 0.1


class _FlatLstm(nn.LSTM):  # type: ignore[misc]
    """A bidirectional layer of :data:`HIDDEN` units over the sequences of a batch, laid one after another."""

    def __init__(self, features: int) -> None:
        super().__init__(features, HIDDEN, bidirectional=True, batch_first=True)
        for name, parameter in self.named_parameters():
            for gate in parameter.data.chunk(4):
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(gate)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.zeros_(gate)
            if "bias_ih" in name:
                parameter.data[HIDDEN : 2 * HIDDEN] = 1.0

    def forward(self, x: Any, offsets: Any, lengths: npt.NDArray[np.int64]) -> Any:
        """Run [n, features] -> [n, 2 * HIDDEN]; sequence ``i`` is ``lengths[i]`` rows from ``offsets[i]`` on."""
        if x.is_cuda and available():
            return bidirectional_lstm(
                x,
                torch.cat([self.weight_ih_l0, self.weight_ih_l0_reverse]),
                torch.stack([self.weight_hh_l0, self.weight_hh_l0_reverse]),
                torch.cat([self.bias_ih_l0 + self.bias_hh_l0, self.bias_ih_l0_reverse + self.bias_hh_l0_reverse]),
                offsets,
            )
        sequences = nn.utils.rnn.pack_sequence(x.split(lengths.tolist()), enforce_sorted=False)
        packed, _ = super().forward(sequences)
        return torch.cat(nn.utils.rnn.unpack_sequence(packed))


class Bidaf(nn.Module):  # type: ignore[misc]
    """The network: words and characters in, logits of the answer's first and last word out.

    Args:
        corpus: gives the vocabularies, the word vectors and the table from types to words and characters.
        char_size: size of a character's vector.
        dropouts: what training leaves out.
    """

    def __init__(self, corpus: Corpus, char_size: int = 8, dropouts: Dropouts | None = None) -> None:
        super().__init__()
        self.dropouts = dropouts or Dropouts()
        self.tuned = corpus.tuned
        vectors = torch.from_numpy(corpus.word_vectors.astype(np.float32))
        features = _FILTERS + vectors.shape[1]
        self.word_tuned = nn.Parameter(vectors[1 : self.tuned].clone())
        self.register_buffer("word_frozen", vectors[self.tuned :].clone(), persistent=False)
        self.register_buffer("type_words", torch.from_numpy(corpus.type_words).long(), persistent=False)
        self.register_buffer("type_chars", torch.from_numpy(corpus.type_chars), persistent=False)
        self.char_emb = nn.Parameter(torch.randn(len(corpus.chars) - 1, char_size) * 0.3)
        self.conv = nn.Conv1d(char_size, _FILTERS, _WIDTH)
        self.hw = nn.ModuleList(nn.Linear(features, 2 * features) for _ in range(2))
        self.ctx_lstm = _FlatLstm(features)
        self.att = nn.Parameter(torch.empty(3, 2 * HIDDEN).uniform_(-0.1, 0.1))
        self.mod1 = _FlatLstm(8 * HIDDEN)
        self.mod2 = _FlatLstm(2 * HIDDEN)
        self.end_lstm = _FlatLstm(14 * HIDDEN)
        self.start = nn.Linear(10 * HIDDEN, 1)
        self.end = nn.Linear(10 * HIDDEN, 1)
        self._initialise(features)

    def _initialise(self, features: int) -> None:
        for layer in self.hw:
            nn.init.xavier_uniform_(layer.weight.data[:features])
            nn.init.xavier_uniform_(layer.weight.data[features:])
            nn.init.zeros_(layer.bias.data[:features])
            nn.init.constant_(layer.bias.data[features:], -1.0)
        nn.init.kaiming_uniform_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)
        for layer in (self.start, self.end):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        """Return the logits of the first and of the last word, float32 [B, T] each; far below 0 in the padding."""
        size, longest = batch.size, batch.longest_context
        context_tokens = batch.context_tokens
        sequence, place = batch.sequence[:context_tokens], batch.padded_place[:context_tokens]
        offsets, lengths = batch.offsets[: size + 1], batch.lengths[:size]

        embedded = self._drop_features(self._embed(batch.types), batch.sequence, 2 * size)
        encoded = self.ctx_lstm(embedded, batch.offsets, batch.lengths)
        padded = encoded.new_zeros(size * (longest + batch.longest_question), 2 * HIDDEN)
        padded = padded.index_copy(0, batch.padded_place, encoded)
        contexts = padded[: size * longest].view(size, longest, -1)
        questions = padded[size * longest :].view(size, batch.longest_question, -1)
        merged = self._attend(batch, encoded[:context_tokens], contexts, questions)

        modelled = self.mod1(self._drop_features(merged, sequence, size), offsets, lengths)
        modelled = self.mod2(self._drop_features(modelled, sequence, size), offsets, lengths)
        start = self._logits(self.start, merged, modelled, batch)
        padded_modelled = modelled.new_zeros(size * longest, 2 * HIDDEN).index_copy(0, place, modelled)
        summary = torch.bmm(start.softmax(1)[:, None, :], padded_modelled.view(size, longest, -1))[:, 0]
        summary = summary.index_select(0, sequence)
        joined = torch.cat([merged, modelled, summary, modelled * summary], 1)
        last = self.end_lstm(self._drop_features(joined, sequence, size), offsets, lengths)
        return start, self._logits(self.end, merged, last, batch)

    def _embed(self, types: Any) -> Any:
        """int32 [n] -> float32 [n, 150]: character CNN and word vector, through the highway layers."""
        words = self.type_words.index_select(0, types)
        if self.training and self.dropouts.unknown > 0:
            dropped = torch.rand(words.shape, device=words.device) < self.dropouts.unknown
            words = torch.where(dropped & (words >= self.tuned), 1, words)
        chars = self.type_chars.index_select(0, types).int()
        count, length = chars.shape
        letters = self._char_table().index_select(0, chars.reshape(-1)).view(count, length, -1)
        letters = F.dropout(letters, self.dropouts.layer, self.training)
        windows = letters.unfold(1, _WIDTH, 1).reshape(count * (length - _WIDTH + 1), -1)
        responses = (windows @ self.conv.weight.flatten(1).t()).view(count, length - _WIDTH + 1, -1)
        features = F.relu(responses.amax(1) + self.conv.bias)
        x = torch.cat([features, self._word_table().index_select(0, words)], 1)
        for layer in self.hw:
            transform, gate = layer(F.dropout(x, self.dropouts.layer / 2, self.training)).chunk(2, 1)
            x = torch.lerp(x, F.relu(transform), torch.sigmoid(gate))
        return x

    def _attend(self, batch: Batch, encoded: Any, contexts: Any, questions: Any) -> Any:
        """Attention flow: [c, 200] words, [B, T, 200] and [B, J, 200] -> [c, 800]."""
        size, longest = batch.size, batch.longest_context
        sequence, place = batch.sequence[: batch.context_tokens], batch.padded_place[: batch.context_tokens]
        numbers = torch.arange(max(longest, batch.longest_question), device=encoded.device)
        outside_context = numbers[None, :longest] >= batch.context_length[:, None]
        outside_question = numbers[None, : batch.longest_question] >= batch.question_length[:, None]
        context_weight, question_weight, product_weight = self.att
        similarity = (
            torch.bmm(contexts * product_weight, questions.transpose(1, 2))
            + (contexts @ context_weight)[:, :, None]
            + (questions @ question_weight)[:, None, :]
        ).masked_fill(outside_question[:, None, :], _OUTSIDE)
        to_question = torch.bmm(similarity.softmax(2), questions).view(size * longest, -1).index_select(0, place)
        best = similarity.amax(2).masked_fill(outside_context, _OUTSIDE).softmax(1)
        to_context = torch.bmm(best[:, None, :], contexts)[:, 0].index_select(0, sequence)
        return torch.cat([encoded, to_question, encoded * to_question, encoded * to_context], 1)

    def _logits(self, layer: Any, merged: Any, modelled: Any, batch: Batch) -> Any:
        values = layer(F.dropout(torch.cat([merged, modelled], 1), self.dropouts.layer, self.training)).squeeze(1)
        size, longest = batch.size, batch.longest_context
        outside = values.new_full((size * longest,), _OUTSIDE)
        return outside.index_copy(0, batch.padded_place[: batch.context_tokens], values).view(size, longest)

    def _drop_features(self, x: Any, sequence: Any, sequences: int) -> Any:
        keep = 1 - self.dropouts.layer
        if not self.training or keep == 1:
            return x
        mask = torch.empty(sequences, x.shape[1], device=x.device).bernoulli_(keep).div_(keep)
        return x * mask.index_select(0, sequence)

    def _word_table(self) -> Any:
        return torch.cat([self.word_tuned.new_zeros(1, self.word_tuned.shape[1]), self.word_tuned, self.word_frozen])

    def _char_table(self) -> Any:
        return torch.cat([self.char_emb.new_zeros(1, self.char_emb.shape[1]), self.char_emb])

    def export(self, *, frozen_words: bool = True) -> Weights:
        """Copy the weights to the host under the names of the shipped file.

        Args:
            frozen_words: give ``word_emb`` all rows; without, only its trained rows ``[0, tuned)``.
        """
        tensors = {name: parameter for name, parameter in self.named_parameters() if name != "word_tuned"}
        table = self._word_table()
        tensors |= {"char_emb": self._char_table(), "word_emb": table if frozen_words else table[: self.tuned]}
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}

    def load(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take weights as :meth:`export` gives them, with or without the frozen rows.

        Raises:
            StateError: a weight is missing, unknown or of another shape.
        """
        own = {("word_emb" if name == "word_tuned" else name): parameter for name, parameter in self.named_parameters()}
        if own.keys() != weights.keys():
            raise StateError(f"weights do not fit the network: {sorted(own.keys() ^ weights.keys())}")
        with torch.no_grad():
            for name, parameter in own.items():
                value = torch.from_numpy(np.asarray(weights[name], np.float32))
                if name in ("char_emb", "word_emb"):
                    value = value[1 : len(parameter) + 1]
                if value.shape != parameter.shape:
                    raise StateError(
                        f"the weight {name!r} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)
