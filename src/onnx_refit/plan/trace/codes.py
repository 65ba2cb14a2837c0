"""Numbers as tensor values: each element's number as a value that no optimiser mistakes for anything else.

A number is multiplied by an odd constant modulo a power of two, so that neighbours get values far apart, and cut into
digits; each digit is one value, in one run of the optimiser. A float32 holds 29 bits, so one run numbers 5e8
elements; an int8 holds 7. Values are ordinary (positive normals for floats), never zero, which stands for padding.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from onnx_refit.tensors import Array, numpy_dtype

Numbers = npt.NDArray[np.int64]
PADDING = -1
FOREIGN = -2
_BLOCK = 1 << 19  # words of random bits drawn at once
_CHUNK = 1 << 18  # elements decoded at once

# Odd, and far from each other; a second one is tried where a coded value equals a constant of the model.
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)

# dtype -> unsigned carrier, bits a value, smallest bit pattern. The patterns are one contiguous range: floats are
# positive normals away from powers of two at the ends, 8-bit integers run over both signs and leave zero out.
_RANGES: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "float32": (np.uint32, 29, 0x40155555),
    "float64": (np.uint64, 48, 0x4002AAAAAAAAAAAA),
    "float16": (np.uint16, 14, 0x3B55),
    "bfloat16": (np.uint16, 13, 0x4015),
    "int8": (np.uint8, 7, 0x40),
    "uint8": (np.uint8, 7, 0x40),
    "int16": (np.uint16, 13, 1003),
    "uint16": (np.uint16, 13, 1003),
    "int32": (np.uint32, 24, 1003),
    "uint32": (np.uint32, 24, 1003),
    "int64": (np.uint64, 40, 1003),
    "uint64": (np.uint64, 40, 1003),
}


@dataclass(frozen=True)
class Code:
    """The code of one dtype for numbers below ``total``.

    Attributes:
        dtype: project dtype name.
        total: how many numbers there are.
        multiplier: odd; spreads neighbouring numbers.
    """

    dtype: str
    total: int
    multiplier: int = MULTIPLIERS[0]

    @staticmethod
    def supports(dtype: str) -> bool:
        """Whether tensors of this dtype can hold numbers."""
        return dtype in _RANGES

    @property
    def digits(self) -> int:
        """Runs of the optimiser that a number takes."""
        bits = _RANGES[self.dtype][1]
        return max(1, -(-max(1, self.total - 1).bit_length() // bits))

    def encode(self, first: int, count: int, digit: int) -> Array:
        """The values of the numbers ``first .. first + count - 1`` in run ``digit``; shape ``[count]``."""
        carrier, bits, base = _RANGES[self.dtype]
        word: type[np.unsignedinteger] = np.uint32 if bits * self.digits <= 32 else np.uint64
        numbers = np.arange(first, first + count, dtype=word)
        numbers *= word(self.multiplier)
        digit = digit if digit < self.digits else 0
        if digit:
            numbers >>= word(bits * digit)
        numbers &= word((1 << bits) - 1)
        numbers += word(base)
        return numbers.astype(carrier, copy=False).view(numpy_dtype(self.dtype))

    def number(self, raws: Sequence[int]) -> int:
        """As ``decode``, of one element: its bits as an unsigned integer in each of the runs."""
        _, bits, base = _RANGES[self.dtype]
        if not any(raws):
            return PADDING
        number = 0
        for digit, raw in enumerate(raws):
            found = raw - base
            if found < 0 or found >> bits:
                return FOREIGN
            number |= found << (bits * digit)
        inverse, modulus = self._inverse
        number = number * inverse & (modulus - 1)
        return number if number < self.total else FOREIGN

    @cached_property
    def _inverse(self) -> tuple[int, int]:
        """What undoes the multiplication, and modulo what: the values of all digits."""
        modulus = 1 << min(64, _RANGES[self.dtype][1] * self.digits)
        return pow(self.multiplier, -1, modulus), modulus

    def decode(self, values: list[Array]) -> Numbers:
        """The numbers of values of one tensor, the same elements from each run; PADDING and FOREIGN for others."""
        result = np.empty(values[0].shape, np.int64)
        flat = result.reshape(-1)
        for first in range(0, flat.size, _CHUNK):
            part = slice(first, first + _CHUNK)
            self._decode([each.reshape(-1)[part] for each in values], flat[part])
        return result

    def _decode(self, values: list[Array], result: Numbers) -> None:
        carrier, bits, base = _RANGES[self.dtype]
        # Modulo 2**64 all of this is exact in uint64: a number has fewer than 64 bits.
        numbers = result.view(np.uint64)
        numbers[...] = 0
        foreign = np.zeros(values[0].shape, bool)
        padding = np.ones(values[0].shape, bool)
        for digit in range(self.digits):
            raw = np.ascontiguousarray(values[digit]).view(carrier).astype(np.uint64)
            padding &= raw == 0
            found = raw - np.uint64(base)
            foreign |= found >= np.uint64(1 << bits)
            numbers |= found << np.uint64(bits * digit)
        inverse, modulus = self._inverse
        numbers *= np.uint64(inverse)
        numbers &= np.uint64(modulus - 1)
        foreign |= numbers >= np.uint64(self.total)
        result[foreign] = FOREIGN
        result[padding] = PADDING


class RandomValues:
    """Fresh random values that no arithmetic turns into infinities.

    Floats lie in [0.25, 0.5) of either sign, with every bit of the mantissa random; integers anywhere in their code's
    range. One block of random bits is drawn and each request gets it multiplied and shifted by random numbers, which is
    several times as fast as drawing all.
    """

    def __init__(self) -> None:
        self._rng = np.random.Generator(np.random.SFC64(secrets.randbits(128)))
        self._block = self._rng.integers(0, 1 << 64, _BLOCK, np.uint64, endpoint=False)

    def __call__(self, dtype: str, count: int, unlike: Array | None = None) -> Array:
        """Random values; shape ``[count]``. Integers differ from those of ``unlike`` (in their code's range)."""
        carrier, bits, base = _RANGES[dtype]
        target = numpy_dtype(dtype)
        width = np.dtype(carrier).itemsize
        words = -(-count * width // 8)
        block = np.resize(self._block, words) if words > _BLOCK else self._block[:words]
        factor, shift = (int(x) for x in self._rng.integers(0, 1 << 63, 2))
        raw = (block * np.uint64(factor | 1) + np.uint64(shift)).view(carrier)[:count]
        if dtype.startswith(("float", "bfloat")):
            fraction = {"float32": 23, "float64": 52, "float16": 10, "bfloat16": 7}[dtype]
            raw &= carrier((1 << (8 * width - 1)) | ((1 << fraction) - 1))
            raw |= carrier(int(np.asarray(0.25, target).view(carrier)))
        else:
            raw &= carrier((1 << bits) - 1)
            if unlike is not None:
                raw ^= raw == unlike.view(carrier) - carrier(base)
            raw += carrier(base)
        return raw.view(target)
