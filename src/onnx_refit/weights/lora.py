"""LoRA adapters in the form of PEFT, merged into the weights they were trained on."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, is_floating
from onnx_refit.weights.nearest import Nearest
from onnx_refit.weights.scan import cast
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from onnx_refit.weights.sources.strict_json import read_object

_PREFIX = "base_model.model."
_PARTS = re.compile(
    r"^(?P<module>.*)\.(?:lora_(?P<half>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<table>[AB])(?:\.[^.]+)?)$"
)


@dataclass(frozen=True)
class Factors:
    """One adapted module: its weight gains ``scaling * B @ A``.

    Attributes:
        a: [r, in, ...].
        b: [out, r, ...]; the kernel of a convolution's b is 1.
        scaling: alpha / r, or alpha / sqrt(r) with rank stabilisation.
        transposed: whether the weight is stored [in, out].
    """

    a: Array
    b: Array
    scaling: float
    transposed: bool

    def delta(self, shape: tuple[int, ...], scale: float) -> Array:
        """What the weight gains, float32, in the weight's shape; WeightsError where the shapes do not fit."""
        a, b = self.a.astype(np.float32), self.b.astype(np.float32)
        rank = a.shape[0]
        product = b.reshape(b.shape[0], rank) @ a.reshape(rank, -1)
        product = (product * np.float32(self.scaling * scale)).reshape(b.shape[0], *a.shape[1:])
        if self.transposed or (product.shape != shape and product.shape[::-1] == shape and product.ndim == 2):
            product = product.T
        if product.shape != shape:
            raise WeightsError(
                f"the adapter is for a weight of shape {list(product.shape)}, the model has {list(shape)}"
            )
        return product


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter.

    Attributes:
        description: where it comes from.
        factors: module -> its low-rank factors.
        replaced: tensors that were trained whole (biases, ``modules_to_save``), by their names in the model.
    """

    description: str
    factors: Mapping[str, Factors]
    replaced: Mapping[str, Array] = field(default_factory=dict)


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or the latter.

    Raises:
        WeightsError: a file cannot be read.
        WeightsFormatError: the adapter is damaged, or of a kind that is not merged exactly (DoRA and others).
    """
    if not os.fspath(path):
        raise WeightsError("the path of the adapter is empty")
    given = Path(path)
    file = given / "adapter_model.safetensors" if given.is_dir() else given
    if not file.exists():
        missing = f"the folder has no {file.name}" if given.is_dir() else "no such file or folder"
        raise WeightsError(missing, where=given, hint="Give the folder of a PEFT adapter")
    if not (file.parent / "adapter_config.json").exists():
        raise WeightsError(
            "the folder of the adapter has no adapter_config.json",
            where=file.parent.absolute(),
            hint="Give the folder of a PEFT adapter",
        )
    config = read_object(file.parent / "adapter_config.json", what="the adapter's configuration")
    _refuse_other_kinds(config, file.parent)
    source = SafetensorsSource(file)
    halves: dict[str, dict[str, Array]] = {}
    replaced: dict[str, Array] = {}
    for name in source.specs:
        match = _PARTS.match(name)
        if match is None:
            replaced[_strip(name).replace(".modules_to_save.default", "")] = source.read(name)
            continue
        array = source.read(name)
        half = match["half"] or match["table"]
        # An embedding's A is [r, rows] and B [dim, r]; its weight is stored [rows, dim].
        halves.setdefault(_strip(match["module"]), {})[half if match["half"] else f"table {half}"] = array
    factors = {module: _factors(module, found, config, file) for module, found in halves.items()}
    if not factors and not replaced:
        raise WeightsFormatError("the adapter has no tensors", where=file)
    return Adapter(str(given), factors, replaced)


def _strip(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(".base_layer")


def _refuse_other_kinds(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise WeightsFormatError(f"the adapter is of type {kind!r}, not LORA", where=where)
    for key in ("use_dora", "use_qalora", "alora_invocation_tokens", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            raise WeightsFormatError(
                f"the adapter uses {key}, which plain merging would get wrong",
                where=where,
                hint="Merge it with PEFT, and refit with the merged weights",
            )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not _is_positive(value):
            raise WeightsFormatError(f"the adapter's configuration has no valid {key!r}", where=where)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            raise WeightsFormatError(f"the adapter's configuration has no valid {key!r}", where=where)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _factors(module: str, found: Mapping[str, Array], config: Mapping[str, Any], where: Path) -> Factors:
    table = "table A" in found or "table B" in found
    a, b = (found.get(f"table {h}") if table else found.get(h) for h in "AB")
    if a is None or b is None or len(found) != 2:
        raise WeightsFormatError(f"{module!r} does not have one lora_A and one lora_B", where=where)
    rank = int(_pattern(config, "rank_pattern", module, config["r"]))
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != rank or b.shape[1] != rank or math.prod(b.shape[2:]) != 1:
        raise WeightsFormatError(
            f"{module!r} has factors {list(a.shape)} and {list(b.shape)}, which are not of rank {rank}", where=where
        )
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a, b, scaling, table or bool(config.get("fan_in_fan_out")))


def _pattern(config: Mapping[str, Any], key: str, module: str, otherwise: float) -> float:
    """The value for a module: that of the first pattern that its name ends with, as PEFT matches them."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        except re.error as error:
            raise WeightsFormatError(f"{key} has no valid pattern {pattern!r}: {error}") from error
    return float(otherwise)


class LoraSource:
    """Weights with adapters merged in: base plus the sum of all deltas in float32, cast to the base's dtype once.

    The same base and adapters give the same bits, whatever was applied in between.

    Args:
        base: the weights that the adapters were trained on, by the names of the trained model.
        adapters: adapters, and how strong each is to be (1 is as trained).

    Raises:
        WeightsError: an adapter is for modules or shapes that the base does not have.
    """

    def __init__(self, base: WeightSource, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._base = base
        self._deltas: dict[str, list[tuple[Factors, float]]] = {}
        self._replaced: dict[str, Array] = {}
        for adapter, scale in adapters:
            if not math.isfinite(scale):
                raise WeightsError(f"{scale} is no scale", where=adapter.description)
            for module, factors in adapter.factors.items():
                name = self._find(f"{module}.weight", adapter)
                if not is_floating(base.specs[name].dtype):
                    raise WeightsError(f"{base.specs[name]} cannot take an adapter", where=adapter.description)
                self._deltas.setdefault(name, []).append((factors, scale))
            for own, array in adapter.replaced.items():
                name = self._find(own, adapter)
                if name in self._replaced:
                    raise WeightsError(f"two adapters replace {name!r}", where=adapter.description)
                if base.specs[name].shape != array.shape:
                    raise WeightsError(
                        f"replaces {base.specs[name]} by a tensor of shape {list(array.shape)}",
                        where=adapter.description,
                    )
                self._replaced[name] = array

    def _find(self, name: str, adapter: Adapter) -> str:
        specs = self._base.specs
        if name in specs:
            return name
        # A wrapper around either model adds a prefix; what follows it must name one tensor only.
        longer = [other for other in specs if other.endswith("." + name)]
        shorter = [other for other in specs if name.endswith("." + other)]
        if len(longer) + len(shorter) == 1:
            return (longer or shorter)[0]
        near = Nearest(specs.values()).find(TensorSpec(name, "float32", None))
        meant = (
            f"Near are {', '.join(str(c) for c in near)}"
            if near
            else "Is it the right base? If it is engine.weights(), which has the names of the exported model, give "
            "names=plan.names too"
        )
        raise WeightsError(
            f"is for {name!r}, which the base {self._base.description} does not have",
            where=adapter.description,
            hint=meant,
        )

    @property
    def description(self) -> str:
        """Base and adapters."""
        return f"{self._base.description} with adapters"

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the base."""
        return self._base.specs

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that adapters touch."""
        return frozenset(self._deltas) | frozenset(self._replaced)

    def read(self, name: str) -> Array:
        """One merged tensor in the base's dtype, or the base's own where no adapter touches it.

        Raises:
            WeightsError: the shapes do not fit, or a value overflows the base's dtype.
        """
        base = self._base.read(name)
        if name not in self._deltas and name not in self._replaced:
            return base
        dtype = self._base.specs[name].dtype
        # Any: NumPy's types have no arithmetic on arrays of an unknown dtype.
        merged: Any = self._replaced.get(name, base).astype(np.float64 if dtype == "float64" else np.float32)
        for factors, scale in self._deltas.get(name, ()):
            merged = merged + factors.delta(base.shape, scale)
        result = cast(merged, dtype, rounding=True)
        if result.array is None:
            raise WeightsError(f"merged values overflow {dtype}", where=name)
        return result.array

    def close(self) -> None:
        """Close the base."""
        self._base.close()
