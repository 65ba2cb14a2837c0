"""What one run is told."""

from dataclasses import asdict, dataclass
from typing import Any

from .errors import TrainingError

__all__ = ["SNAPSHOTS", "Settings"]

SNAPSHOTS = (0.015, 0.04, 0.1, 0.25, 0.5, 0.75)
"""Shares of a run after which a snapshot of the weights is written."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run; a resumed run needs the same.

    Attributes:
        seed: of initial weights, dropout and order; runs on one device are repeatable on a CPU.
        epochs: length of the learning-rate schedule.
        minutes: if positive, the schedule is shortened so that the run ends in this time.
        batch: examples a step; 64 fills a GPU of 132 multiprocessors in the fused LSTM.
        learning_rate: the highest; it rises over ``warmup`` steps and falls along a cosine to ``final_rate`` of it.
        word_rate: learning rate of the word table over that of the rest.
        dropout: see :class:`.model.Dropouts`.
        unknown_dropout: see :class:`.model.Dropouts`.
        average: decay of the moving average of the weights, which is what is scored and kept.
        soft_weight: share of the soft labels in the loss, the rest being the answers themselves.
        char_size: size of a character's vector.
        limit: train on the first examples only, if positive.
        dev_limit: score the first dev examples only, if positive.
        evaluate_every: epochs between scores.
        state_every: steps between checkpoints.
    """

    seed: int = 1
    epochs: float = 14.0
    minutes: float = 0.0
    batch: int = 64
    learning_rate: float = 2.5e-3
    word_rate: float = 0.2
    final_rate: float = 0.02
    warmup: int = 500
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 5.0
    dropout: float = 0.2
    unknown_dropout: float = 0.1
    average: float = 0.999
    soft_weight: float = 0.0
    char_size: int = 8
    limit: int = 0
    dev_limit: int = 0
    evaluate_every: float = 1.0
    state_every: int = 2000

    def __post_init__(self) -> None:
        shares = (self.dropout, self.unknown_dropout, self.soft_weight, self.average, self.final_rate)
        if not all(0 <= share <= 1 for share in shares) or self.dropout == 1:
            raise TrainingError("shares (dropouts, soft weight, average, final rate) lie between 0 and 1")
        if self.epochs < 0 or self.batch < 1 or self.learning_rate <= 0 or self.char_size < 1:
            raise TrainingError("epochs, batch, learning rate and character size must be positive")
        if self.evaluate_every <= 0 or self.state_every < 1:
            raise TrainingError("the intervals of scores and checkpoints must be positive")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON takes them."""
        return asdict(self)
