"""The search for the checkpoint tensors that the weights of a model are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx_refit.tensors import Array, dtype_name
from onnx_refit.weights.provenance.analogy import Siblings, analogous
from onnx_refit.weights.provenance.arithmetic import find_folded_biases, find_folded_weights, find_scales
from onnx_refit.weights.provenance.bits import arrangements, is_constant, signature
from onnx_refit.weights.provenance.choose import Chooser, Tie
from onnx_refit.weights.provenance.clues import Clues
from onnx_refit.weights.provenance.expression import BatchNormFold, Convert, Expression, Stored
from onnx_refit.weights.provenance.parts import find_concatenations, find_slices
from onnx_refit.weights.provenance.pool import Pool
from onnx_refit.weights.provenance.rows import find_rows
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource


def search(
    weights: Mapping[str, Array], checkpoint: WeightSource, clues: Clues
) -> tuple[dict[str, Expression], list[Tie]]:
    """One exact expression for each weight that has one, and the ties that were broken.

    Args:
        weights: weight name -> its value in the model.
        checkpoint: the checkpoint that the model was exported from.
        clues: where the weights stand in the graph.
    """
    pool = Pool(checkpoint, (array.size for array in weights.values()))
    named = {name: Stored(name) for name, array in weights.items() if _same_by_name(pool, name, array)}
    options: dict[str, list[Expression]] = {}
    constants: list[str] = []
    scales: dict[BatchNormFold, Array] = {}
    arranged: dict[tuple[object, ...], list[Expression]] = {}
    for name, array in weights.items():
        if name in named or array.dtype.kind == "O" or dtype_name(array.dtype) == "complex128":
            continue
        constant = is_constant(array)
        if constant and clues.is_state(name):
            continue  # zeros, and no parameter, whatever else is zero
        if constant:
            constants.append(name)
            # There may be thousands, all with the same thousands of candidates.
            alike = (array.dtype.str, array.shape, array.reshape(-1)[:1].tobytes())
            if alike not in arranged:
                arranged[alike] = _arranged(pool, array)
            found = arranged[alike]
        else:
            found = _arranged(pool, array) or _derived(pool, array, scales)
        if found:
            options[name] = found
    _add_folded_biases(pool, weights, named, options, clues, scales)
    _add_analogies(pool, weights, named, options, constants, clues)
    return Chooser(clues, pool.position).choose(named, options)


def _derived(pool: Pool, array: Array, scales: dict[BatchNormFold, Array]) -> list[Expression]:
    """How a weight that is no single tensor is made, trying the plainest operations first.

    Folds come before scales: a BatchNorm that was never trained scales all channels alike. The scales of folds are
    added to ``scales``.
    """
    for find in (find_concatenations, find_slices, find_rows):
        found = find(pool, array)
        if found:
            return found
    folds = find_folded_weights(pool, array)
    scales.update(folds)
    return list(folds) or find_scales(pool, array)


def _same_by_name(pool: Pool, name: str, array: Array) -> bool:
    spec = pool.specs.get(name)
    return spec is not None and spec.shape == array.shape and same_bits(pool.read(name), array)


def _arranged(pool: Pool, array: Array) -> list[Expression]:
    """The single tensors that the weight is a rearrangement of, as they are stored or else after a cast."""
    wanted = signature(array)
    constant = is_constant(array)
    found: list[Expression] = []
    for name in pool.alike(wanted):
        ways = arrangements(array, pool.read(name), Stored(name))
        # Of a constant every arrangement fits; keep all, for the habits of the model to decide.
        found += ways if constant else _first(ways)
    if found:
        return found
    dtype = dtype_name(array.dtype)
    for name in pool.alike_when_converted(wanted, dtype):
        converted = pool.convert(name, dtype)
        if converted is not None:
            ways = arrangements(array, converted, Convert(Stored(name), dtype))
            found += ways if constant else _first(ways)
    return found


def _first(ways: Iterable[Expression]) -> list[Expression]:
    first = next(iter(ways), None)
    return [] if first is None else [first]


def _add_folded_biases(
    pool: Pool,
    weights: Mapping[str, Array],
    named: dict[str, Stored],
    options: dict[str, list[Expression]],
    clues: Clues,
    scales: Mapping[BatchNormFold, Array],
) -> None:
    """Explain the biases of folded layers; beside a folded weight that explanation beats any other."""
    folds = {name: [e for e in found if isinstance(e, BatchNormFold)] for name, found in options.items()}
    if not scales:
        return
    for name, array in weights.items():
        beside = folds.get(clues.partner(name) or "", [])
        if beside:
            found = find_folded_biases(pool, array, {fold: scales[fold] for fold in beside})
            if found:
                named.pop(name, None)
                options[name] = found
        elif name not in named and name not in options:
            found = find_folded_biases(pool, array, scales)
            if found:
                options[name] = found


def _add_analogies(
    pool: Pool,
    weights: Mapping[str, Array],
    named: Mapping[str, Expression],
    options: dict[str, list[Expression]],
    constants: list[str],
    clues: Clues,
) -> None:
    """Let constants be pieces too, where the weight beside them is one."""
    known = {**named, **{name: found[0] for name, found in options.items() if len(found) == 1}}
    if not constants or not known:
        return
    siblings = Siblings(list(pool.specs))
    order = clues.sorted(weights)
    for name in constants:
        if weights[name].ndim != 1:
            continue
        for expression in analogous(pool, siblings, name, weights[name], order, known):
            found = options.get(name, [])
            if expression not in found:
                options[name] = [*found, expression]
