"""Weights that a client sends: checked once, before any replica sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import check
from onnx_refit.refit.constants import floating_constants, refuse_changed_constants
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.messages import RefitOrder
from onnx_refit.serve.cluster.parcel import Parcel, pack, unpack
from onnx_refit.tensors import Array
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource


@dataclass(frozen=True)
class Transport:
    """How weights travel.

    Attributes:
        ship: gives a parcel to the transport; what it returns is what replicas get to open.
        open: opens what ``ship`` returned, here or on another machine.
    """

    ship: Callable[[Parcel], object] = lambda parcel: parcel
    open: Callable[[Any], Parcel] = lambda parcel: parcel


@dataclass(frozen=True)
class Accepted:
    """Weights that the check accepted.

    Attributes:
        arrays: by the plan's names.
        weights: the same, as the transport ships them.
        partial: whether some weights stay as they are.
    """

    arrays: dict[str, Array]
    weights: object
    partial: bool


class Incoming:
    """The check in front of a cluster.

    Args:
        plan: the plan.
        book: has the current weights.
        transport: how weights travel.
    """

    def __init__(self, plan: Plan, book: Book, transport: Transport) -> None:
        self._plan, self._book, self._transport = plan, book, transport
        self._constants = floating_constants(plan.compiled)

    def check(self, order: RefitOrder) -> Accepted:
        """Check an order's weights; RefitRejectedError carries the report, WeightsError says that they are damaged."""
        given = ArraysSource(unpack(self._transport.open(order.weights)), order.source)
        view: WeightSource = given if self._plan.names is None else MappedView(given, self._plan.names)
        looks_back = order.options.compare or order.options.measure
        current = self._book.stored().read if looks_back else None
        report, arrays = check(self._plan.compiled.sources, view, current=current, options=order.options)
        report = refuse_changed_constants(report, view, self._constants)
        report.raise_if_rejected()
        # What was shipped once is not shipped again, unless the check had to rename, cast or leave out something.
        same = given.specs.keys() == arrays.keys() and all(given.read(name) is arrays[name] for name in arrays)
        weights = order.weights if same else self._transport.ship(pack(arrays))
        return Accepted(arrays, weights, partial=len(arrays) < len(self._plan.compiled.sources))
