"""The kernel that computes a family of engine weights, as text."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.lowering.pointwise import RANK

THREADS = 256
WARP = 32


def code(lines: Sequence[str], varies: Sequence[bool], rank: int, half: int = 0, taken: int | None = None) -> str:
    """The kernel's source.

    Args:
        lines: the formula's statements.
        varies: for every leaf, whether it varies along a line in some member.
        rank: dimensions of any size in any member; the walk's last ones.
        half: the kind of halves that it writes, see halves.cu; 0 for float32.
        taken: the leaf that is looked at for NaN and infinities and kept; it varies along every line.
    """
    names = [f"i{axis}" for axis in range(RANK - rank, RANK)]
    walk, left = [], "p.line"
    for axis in range(RANK - 2, RANK - rank, -1):
        walk.append(f"const unsigned i{axis} = {left} % m.sizes[{axis}], q{axis} = {left} / m.sizes[{axis}];")
        left = f"q{axis}"
    if rank > 1:
        walk.append(f"const unsigned {names[0]} = {left};")
    count = len(varies)
    moving = [index for index, varying in enumerate(varies) if varying]
    pointers = []
    for index in range(count):
        at = " + ".join(f"(long long){name} * m.s[{index}][{name[1:]}]" for name in names[:-1])
        pointers.append(f"reinterpret_cast<const float*>(base + sources[m.leaf[{index}]]) + {at or 0}")
    words = 5 + RANK + count * (RANK + 1)  # of a member
    look, look4, keep, keep4 = _taking(taken)
    return "\n".join(
        [
            # Four elements side by side, or one for all four.
            "__device__ __forceinline__ float4 load4(const float* from, unsigned i, int step) {",
            "  if (step) return __ldg(reinterpret_cast<const float4*>(from + i));",
            "  const float one = __ldg(from);",
            "  return make_float4(one, one, one, one);",
            "}",
            *([kernels.source("halves.cu")] if half else ()),
            *(_LOOK if taken is not None else ()),
            f"struct Member {{ unsigned sizes[{RANK}], leaf[{count}]; int s[{count}][{RANK}]; }};",
            "struct Piece { unsigned member, line, begin, count; };",
            'extern "C" __global__ __launch_bounds__(256) void family(',
            "    const unsigned long long* __restrict__ sources, const unsigned* __restrict__ members,",
            "    const Piece* __restrict__ pieces, long long n, int* found, unsigned long long base,",
            "    unsigned char* __restrict__ out, unsigned char* __restrict__ kept) {",
            f"  const unsigned own = blockIdx.x * {THREADS // WARP} + threadIdx.x / {WARP};",
            f"  const unsigned lane = threadIdx.x % {WARP};",
            "  if (own >= n) return;",
            "  const Piece p = pieces[own];",
            "  Member m;",
            f"  const unsigned* from = members + p.member * {words};",
            "  const unsigned long long at = from[0] | ((unsigned long long)from[1] << 32);",
            f"  for (int k = 0; k < {RANK}; ++k) m.sizes[k] = from[4 + k];",
            f"  for (int k = 0; k < {count}; ++k) m.leaf[k] = from[{4 + RANK} + k];",
            f"  for (int k = 0; k < {count * RANK}; ++k) (&m.s[0][0])[k] = (int)from[{4 + RANK + count} + k];",
            f"  const unsigned long long begin = (unsigned long long)p.line * m.sizes[{RANK - 1}];",
            f"  {'unsigned short' if half else 'float'}* to = "
            f"reinterpret_cast<{'unsigned short' if half else 'float'}*>(out + at) + begin;",
            *(_KEEP if taken is not None else ()),
            *(f"  {line}" for line in walk),
            *(f"  const float* f{index} = {pointer};" for index, pointer in enumerate(pointers)),
            # What does not vary along a line is computed once: the compiler sees that.
            *(f"  const float v{index} = __ldg(f{index});" for index, varying in enumerate(varies) if not varying),
            "  const unsigned end = p.begin + p.count;",
            f"  if (from[{words - 1}]) {{",
            "#pragma unroll 2",
            f"    for (unsigned i = p.begin + 4 * lane; i < end; i += {4 * WARP}) {{",
            *(f"      const float4 w{k} = load4(f{k}, i, m.s[{k}][{RANK - 1}]);" for k in moving),
            *(f"      const float l{k}[4] = {{w{k}.x, w{k}.y, w{k}.z, w{k}.w}};" for k in moving),
            *look4,
            *keep4,
            "      float o[4];",
            "#pragma unroll",
            "      for (int k = 0; k < 4; ++k) {",
            *(f"        const float v{k} = l{k}[k];" for k in moving),
            *(f"        {line}" for line in lines),
            "        o[k] = result;",
            "      }",
            f"      {_store4(half)}",
            "    }",
            *(_SAY if taken is not None else ()),
            "    return;",
            "  }",
            "#pragma unroll 4",
            f"  for (unsigned i = p.begin + lane; i < end; i += {WARP}) {{",
            *(f"    const float v{k} = __ldg(f{k} + (long long)i * m.s[{k}][{RANK - 1}]);" for k in moving),
            *look,
            *keep,
            *(f"    {line}" for line in lines),
            f"    to[i] = {f'(unsigned short)half_bits(__float_as_uint(result), {half})' if half else 'result'};",
            "  }",
            *(_SAY if taken is not None else ()),
            "}",
        ]
    )


# A float is NaN or infinite if and only if all bits of its exponent are set.
_LOOK = (
    "__device__ __forceinline__ bool infinite(float v) {",
    "  return (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u;",
    "}",
)
_KEEP = (
    "  const unsigned long long aside = from[2] | ((unsigned long long)from[3] << 32);",
    "  float* keep = aside == ~0ull ? nullptr : reinterpret_cast<float*>(kept + aside) + begin;",
    "  bool bad = false;",
)
_SAY = ("  if (bad) *reinterpret_cast<volatile int*>(found) = 1;",)


def _store4(half: int) -> str:
    if not half:
        return "*reinterpret_cast<float4*>(to + i) = make_float4(o[0], o[1], o[2], o[3]);"
    low, high = (
        f"half_bits(__float_as_uint(o[{k}]), {half}) | (half_bits(__float_as_uint(o[{k + 1}]), {half}) << 16)"
        for k in (0, 2)
    )
    return f"*reinterpret_cast<uint2*>(to + i) = make_uint2({low}, {high});"


def _taking(taken: int | None) -> tuple[list[str], list[str], list[str], list[str]]:
    """Statements that look at an element, at four, that keep it, and four."""
    if taken is None:
        return [], [], [], []
    one = f"v{taken}"
    return (
        [f"    bad |= infinite({one});"],
        [
            f"      const float4 own4 = w{taken};",
            "      bad |= infinite(own4.x) || infinite(own4.y) || infinite(own4.z) || infinite(own4.w);",
        ],
        [f"    if (keep) keep[i] = {one};"],
        ["      if (keep) *reinterpret_cast<float4*>(keep + i) = own4;"],
    )
