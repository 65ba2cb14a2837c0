"""Choosing among tensors whose bits do not tell them apart, by their names and surroundings."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from onnx_refit.weights.nearest import tokens
from onnx_refit.weights.provenance.clues import Clues, name_agreement, path_agreement, shared_prefix, telling
from onnx_refit.weights.provenance.expression import (
    Concat,
    Expression,
    Reshape,
    Slice,
    Stored,
    Take,
    Transpose,
    describe,
    tensors_of,
)

_SCORED = 100  # options that are all scored; of more, only likely ones
_BESIDE = 6  # options taken on either side of a neighbour's place in the checkpoint
_REACH = 6  # neighbours looked at on each side
_NAME, _PATH, _NEIGHBOUR, _ORDER, _ROLE = 2.0, 1.5, 1.2, 0.6, 1.0


@dataclass(frozen=True)
class Tie:
    """A weight whose bits occur more than once in the checkpoint.

    Attributes:
        weight: the weight.
        chosen: what was chosen.
        alternatives: what it could have been just as well, by its bits; the first hundred.
        margin: how much better the choice agrees with names and surroundings than the next one; 0 is a guess.
    """

    weight: str
    chosen: Expression
    alternatives: tuple[Expression, ...]
    margin: float

    def __str__(self) -> str:
        others = ", ".join(describe(a) for a in self.alternatives[:3])
        more = f" and {len(self.alternatives) - 3} more" if len(self.alternatives) > 3 else ""
        return f"{self.weight}: {describe(self.chosen)}, not {others}{more}"


class Chooser:
    """Breaks ties for all weights of a model.

    Args:
        clues: order and uses of the weights.
        position: checkpoint tensor -> its place in the checkpoint.
    """

    def __init__(self, clues: Clues, position: Mapping[str, int]) -> None:
        self._clues = clues
        self._position = position
        self._words: dict[str, tuple[str, ...]] = {}
        self._indexes: dict[int, _Index] = {}

    def choose(
        self, fixed: Mapping[str, Expression], options: Mapping[str, Sequence[Expression]]
    ) -> tuple[dict[str, Expression], list[Tie]]:
        """One expression for each weight.

        Args:
            fixed: weights that need no choice.
            options: weight -> the expressions that give its bits, at least one.
        """
        chosen = dict(fixed)
        open_: dict[str, Sequence[Expression]] = {}
        for weight, found in options.items():
            if len(found) == 1:
                chosen[weight] = found[0]
            else:
                open_[weight] = found
        order = {w: i for i, w in enumerate(self._clues.sorted([*fixed, *options]))}
        settled = dict(chosen)
        margins: dict[str, float] = {}
        # The second round sees what the first one chose.
        for _ in range(2):
            picked, margins = self._assign(settled, open_, order, taken=set(chosen.values()))
            settled = {**chosen, **picked}
        ties = [
            Tie(weight, settled[weight], _others(found, settled[weight]), margins[weight])
            for weight, found in sorted(open_.items(), key=lambda item: order[item[0]])
        ]
        return settled, ties

    def _assign(
        self,
        settled: Mapping[str, Expression],
        open_: Mapping[str, Sequence[Expression]],
        order: Mapping[str, int],
        taken: set[Expression],
    ) -> tuple[dict[str, Expression], dict[str, float]]:
        habits = self._habits(settled)
        by_order = sorted(settled, key=lambda w: order[w])
        scored: list[tuple[float, int, int, str, Expression]] = []
        best_two: dict[str, list[float]] = {}
        for weight, found in open_.items():
            around = self._around(weight, by_order, settled, order)
            scores = []
            for rank, expression in self._likely(weight, found, around):
                score = self._score(weight, expression, around) + habits.get(
                    (*self._habit(weight), _kind(expression)), 0
                )
                scores.append(score)
                scored.append((-score, order[weight], rank, weight, expression))
            best_two[weight] = sorted(scores, reverse=True)[:2]
        scored.sort(key=lambda s: s[:3])
        picked: dict[str, Expression] = {}
        used = {_stored(e) for e in taken}
        # First everyone a tensor of its own, then, where there are more weights than tensors, shared ones.
        for sharing in (False, True):
            for _, _, _, weight, expression in scored:
                if weight in picked or (not sharing and _stored(expression) in used):
                    continue
                picked[weight] = expression
                used.add(_stored(expression))
        for weight, found in open_.items():
            if weight not in picked:
                picked[weight] = found[0]
        return picked, {w: round(two[0] - two[-1], 4) for w, two in best_two.items()}

    def _likely(
        self, weight: str, found: Sequence[Expression], around: Sequence[tuple[float, str, int]]
    ) -> Iterable[tuple[int, Expression]]:
        """The options worth scoring: all of a few; of many those near the neighbours, and those of like names."""
        if len(found) <= _SCORED:
            return enumerate(found)
        index = self._indexes.get(id(found))
        if index is None:
            index = self._indexes[id(found)] = _Index(found, self._position, self._tokens)
        names = [telling(weight), *(self._tokens(use.node) for use in self._clues.uses.get(weight, ()))]
        names += [self._tokens(tensor) for _, tensor, _ in around]
        ranks = index.near(self._position.get(tensor, 0) for _, tensor, _ in around) | index.alike(names)
        return [(rank, found[rank]) for rank in sorted(ranks)] if ranks else list(enumerate(found))[:_SCORED]

    def _habit(self, weight: str) -> tuple[str, int]:
        uses = self._clues.uses.get(weight, ())
        return (uses[0].op, uses[0].index) if uses else ("", 0)

    def _habits(self, settled: Mapping[str, Expression]) -> dict[tuple[object, ...], float]:
        """How weights at the same place of the same operator are arranged in this model, as a share of them."""
        seen: Counter[tuple[object, ...]] = Counter()
        total: Counter[tuple[object, ...]] = Counter()
        for weight, expression in settled.items():
            habit = self._habit(weight)
            seen[(*habit, _kind(expression))] += 1
            total[habit] += 1
        return {key: count / total[key[:2]] for key, count in seen.items()}

    def _around(
        self, weight: str, by_order: Sequence[str], settled: Mapping[str, Expression], order: Mapping[str, int]
    ) -> list[tuple[float, str, int]]:
        """The settled weights nearby: (weight of the clue, tensor, -1 before or 1 after)."""
        here = order[weight]
        low = _bisect(by_order, order, here)
        nodes = {use.node for use in self._clues.uses.get(weight, ()) if use.node}
        found = []
        for side, near in (
            (-1, [w for w in by_order[max(0, low - _REACH - 1) : low] if w != weight]),
            (1, [w for w in by_order[low : low + _REACH + 1] if w != weight]),
        ):
            for other in near:
                distance = abs(order[other] - here)
                clue = (1.1 if side < 0 else 1.0) / distance  # a bias follows its weight
                if any(use.node in nodes for use in self._clues.uses.get(other, ())):
                    clue += 2.0
                found.append((clue, _main(settled[other]), side))
        return found

    def _score(self, weight: str, expression: Expression, around: Sequence[tuple[float, str, int]]) -> float:
        tensor = _main(expression)
        words = self._tokens(tensor)
        score = _NAME * name_agreement(telling(weight), words)
        paths = [path_agreement(self._tokens(use.node), words) for use in self._clues.uses.get(weight, ())]
        score += _PATH * max(paths, default=0.0)
        if words and self._clues.fits_role(weight, words[-1]):
            score += _ROLE
        # That a neighbour chose this very tensor is no reason to choose it too.
        around = [clue for clue in around if clue[1] != tensor]
        total = sum(clue for clue, _, _ in around)
        if total:
            score += _NEIGHBOUR * sum(c * shared_prefix(self._tokens(t), words) for c, t, _ in around) / total
            here = self._position.get(tensor, 0)
            kept = sum(c for c, t, side in around if (self._position.get(t, 0) - here) * side >= 0)
            score += _ORDER * kept / total
        return score

    def _tokens(self, name: str) -> tuple[str, ...]:
        words = self._words.get(name)
        if words is None:
            words = self._words[name] = tokens(name)
        return words


class _Index:
    """Many options, by where their tensors stand in the checkpoint and by the words of their names."""

    def __init__(
        self, found: Sequence[Expression], position: Mapping[str, int], words: Callable[[str], tuple[str, ...]]
    ) -> None:
        self.options = found  # kept, so that no other list gets its id
        places = sorted((position.get(_main(expression), 0), rank) for rank, expression in enumerate(found))
        self._places = [place for place, _ in places]
        self._ranks = [rank for _, rank in places]
        self._by_word: dict[str, list[int]] = {}
        for rank, expression in enumerate(found):
            for word in set(words(_main(expression))):
                self._by_word.setdefault(word, []).append(rank)

    def near(self, positions: Iterable[int]) -> set[int]:
        """The ranks of the options next to some places of the checkpoint."""
        ranks: set[int] = set()
        for place in positions:
            at = bisect_left(self._places, place)
            ranks.update(self._ranks[max(0, at - _BESIDE) : at + _BESIDE])
        return ranks

    def alike(self, names: Iterable[Sequence[str]]) -> set[int]:
        """The ranks of the options that share the most telling words with one of some names."""
        votes: Counter[int] = Counter()
        for name in names:
            for word in set(name):
                ranks = self._by_word.get(word, ())
                for rank in ranks if len(ranks) <= _SCORED else ():
                    votes[rank] += 1
        return {rank for rank, _ in votes.most_common(_SCORED)}


def _others(found: Sequence[Expression], chosen: Expression) -> tuple[Expression, ...]:
    return tuple(islice((e for e in found if e != chosen), 100))


def _bisect(by_order: Sequence[str], order: Mapping[str, int], here: int) -> int:
    low, high = 0, len(by_order)
    while low < high:
        middle = (low + high) // 2
        if order[by_order[middle]] < here:
            low = middle + 1
        else:
            high = middle
    return low


def _main(expression: Expression) -> str:
    return next(iter(tensors_of(expression)))


def _stored(expression: Expression) -> object:
    """What must not be used twice: a tensor however it is arranged, but each piece of one by itself."""
    match expression:
        case Stored() | Slice() | Concat() | Take():
            return expression
        case Reshape(of, _) | Transpose(of, _):
            return _stored(of)
    return expression


def _kind(expression: Expression) -> object:
    """The arrangement without the names."""
    match expression:
        case Stored():
            return "stored"
        case Transpose(of, perm):
            return ("transpose", perm, _kind(of))
        case Reshape(of, shape):
            return ("reshape", len(shape), _kind(of))
        case Slice(of, axis, _, _):
            return ("slice", axis, _kind(of))
        case Concat(parts, axis):
            return ("concat", axis, len(parts))
    return type(expression).__name__
