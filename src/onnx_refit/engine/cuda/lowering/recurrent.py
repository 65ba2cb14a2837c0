"""LSTM and GRU in every form that ONNX has: a plain loop, PyTorch's library kernels, or a persistent kernel.

Which runs, for each node: the persistent kernel on a GPU where the hidden size allows it; the library (cuDNN on a GPU)
for the common form; the loop for the rest (peepholes, clipping, other activations, sequence lengths).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from onnx_refit.engine.cuda import persistent
from onnx_refit.engine.cuda.lowering.form import DEFAULTS, Form
from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, operator
from onnx_refit.errors import EngineError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": torch.nn.functional.softsign,
    "softplus": torch.nn.functional.softplus,
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def choose(node: Node, form: Form) -> str:
    """``"persistent"``, ``"library"`` or ``"loop"``: the fastest of those that can do it and are allowed."""
    if node.recurrent == "loop":
        return "loop"
    if node.recurrent != "library" and persistent.can_run(form):
        return "persistent"
    # Libraries run one direction forwards or both; a lone backward one is the loop's.
    return "library" if form.common and form.reversed in ((False,), (False, True)) else "loop"


@operator("LSTM")
def lstm(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> Any:
    """Y [time, directions, batch, hidden], Y_h and Y_c [directions, batch, hidden]; ``layout`` 1 puts batch first."""
    return _run(node, x, w, r, b, lengths, h, c, p)


@operator("GRU", "RNN")
def gru(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    """Y [time, directions, batch, hidden], Y_h [directions, batch, hidden]; ``layout`` 1 puts batch first."""
    return _run(node, x, w, r, b, lengths, h, None, None)


def _run(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    p: Tensor | None,
) -> Any:
    batch_first = bool(node.get("layout", 0))
    if batch_first:
        x = x.transpose(0, 1)
        h, c = (None if state is None else state.transpose(0, 1) for state in (h, c))
    form = _form(node, x, w, r, b, lengths, h, c, p)
    how = choose(node, form)
    run = {"persistent": persistent.run, "library": run_library, "loop": run_loop}[how]
    y, last, cell = run(form)
    if batch_first:
        y = y.permute(2, 0, 1, 3)
        last = last.transpose(0, 1)
        cell = None if cell is None else cell.transpose(0, 1)
    return (y, last) if cell is None else (y, last, cell)


def _form(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    p: Tensor | None,
) -> Form:
    kind, count = node.op_type, w.shape[0]
    direction = node.get("direction", "forward")
    names = [_name(name) for name in node.get("activations") or DEFAULTS[kind] * count]
    if node.get("activation_alpha") or node.get("activation_beta"):
        raise EngineError("activations with parameters are not supported", where=node.name)
    unknown = [name for name in names if name not in _ACTIVATIONS]
    if unknown:
        raise EngineError(f"the activation {unknown[0]} is not supported", where=node.name)
    each = len(DEFAULTS[kind])
    return Form(
        kind=kind,
        x=x,
        w=w,
        r=r,
        b=b,
        lengths=lengths,
        h=h,
        c=c,
        p=p,
        hidden=r.shape[-1],
        reversed={"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction],
        activations=tuple(tuple(names[d * each : (d + 1) * each]) for d in range(count)),
        clip=node.get("clip"),
        coupled=bool(node.get("input_forget", 0)),
        linear_before_reset=bool(node.get("linear_before_reset", 0)),
    )


def _name(name: object) -> str:
    return (name.decode() if isinstance(name, bytes) else str(name)).lower()


def biases(form: Form, direction: int) -> tuple[Tensor, Tensor]:
    """Input and recurrent bias of a direction, zeros where there are none; each [gates * hidden]."""
    size = _GATES[form.kind] * form.hidden
    if form.b is None:
        zero = torch.zeros(size, dtype=form.x.dtype, device=form.x.device)
        return zero, zero
    return form.b[direction, :size], form.b[direction, size:]


# ONNX orders the gates i o f c (LSTM) and z r h (GRU); PyTorch i f c o and r z h.
_LIBRARY_MODE = {"RNN": 1, "LSTM": 2, "GRU": 3}  # cuDNN's numbers
_LIBRARY_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


def _reorder(kind: str, tensor: Tensor) -> Tensor:
    parts = tensor.chunk(_GATES[kind], 0)
    return torch.cat([parts[index] for index in _LIBRARY_ORDER[kind]], 0)


def run_library(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """PyTorch's own LSTM or GRU: cuDNN on a GPU."""
    weights: list[Tensor] = []
    for direction in range(len(form.reversed)):
        wb, rb = biases(form, direction)
        tensors = (form.w[direction], form.r[direction], wb, rb)
        weights.extend(_reorder(form.kind, tensor).contiguous() for tensor in tensors)
    shape = (len(form.reversed), form.x.shape[1], form.hidden)
    if form.x.is_cuda:
        # cuDNN reads one piece of memory: laid out here, or PyTorch does it at every call and warns.
        sizes = form.x.shape[2], _LIBRARY_MODE[form.kind], form.hidden, 0, 1
        torch._cudnn_rnn_flatten_weight(weights, 4, *sizes, False, len(form.reversed) == 2)
    zero = torch.zeros(shape, dtype=form.x.dtype, device=form.x.device)
    h = zero if form.h is None else form.h
    both = len(form.reversed) == 2
    cell: Tensor | None = None
    if form.kind == "LSTM":
        c = zero if form.c is None else form.c
        y, last, cell = torch.lstm(form.x, (h, c), weights, True, 1, 0.0, False, both, False)
    else:
        function = torch.gru if form.kind == "GRU" else torch.rnn_tanh
        y, last = function(form.x, h, weights, True, 1, 0.0, False, both, False)
    time, batch = form.x.shape[:2]
    return y.reshape(time, batch, len(form.reversed), form.hidden).transpose(1, 2), last, cell


def run_loop(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step by step, as ONNX writes the equations down; every form."""
    results = [_direction(form, direction) for direction in range(len(form.reversed))]
    y = torch.stack([one[0] for one in results], 1)
    last = torch.stack([one[1] for one in results])
    cell = torch.stack([one[2] for one in results]) if form.kind == "LSTM" else None
    return y, last, cell


def _direction(form: Form, d: int) -> tuple[Tensor, Tensor, Tensor]:
    time, batch = form.x.shape[:2]
    zero = torch.zeros(batch, form.hidden, dtype=form.x.dtype, device=form.x.device)
    h = zero if form.h is None else form.h[d]
    c = zero if form.c is None else form.c[d]
    wb, rb = biases(form, d)
    projected = form.x @ form.w[d].t() + wb
    step = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}[form.kind]
    outputs: list[Tensor] = [zero] * time
    order = range(time - 1, -1, -1) if form.reversed[d] else range(time)
    for t in order:
        new_h, new_c = step(form, d, projected[t], rb, h, c)
        if form.lengths is None:
            h, c, y = new_h, new_c, new_h
        else:
            active = (t < form.lengths.to(form.x.device)).unsqueeze(1)
            h, c = torch.where(active, new_h, h), torch.where(active, new_c, c)
            y = torch.where(active, new_h, zero)
        outputs[t] = y
    return torch.stack(outputs), h, c


def _bounded(form: Form, value: Tensor) -> Tensor:
    return value if form.clip is None else value.clamp(-form.clip, form.clip)


def _lstm_step(form: Form, d: int, x: Tensor, rb: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f_act, g_act, h_act = (_ACTIVATIONS[name] for name in form.activations[d])
    i, o, f, g = (x + h @ form.r[d].t() + rb).chunk(4, -1)
    pi, po, pf = (0, 0, 0) if form.p is None else form.p[d].chunk(3)
    i = f_act(_bounded(form, i + pi * c))
    f = 1 - i if form.coupled else f_act(_bounded(form, f + pf * c))
    c = f * c + i * g_act(_bounded(form, g))
    o = f_act(_bounded(form, o + po * c))
    return o * h_act(c), c


def _gru_step(form: Form, d: int, x: Tensor, rb: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f_act, g_act = (_ACTIVATIONS[name] for name in form.activations[d])
    size = form.hidden
    xz, xr, xh = x.chunk(3, -1)
    rz, rr, rh = form.r[d].chunk(3)
    bz, br, bh = rb.chunk(3)
    z = f_act(_bounded(form, xz + h @ rz.t() + bz))
    r = f_act(_bounded(form, xr + h @ rr.t() + br))
    if form.linear_before_reset:
        candidate = g_act(_bounded(form, xh + r * (h @ rh.t() + bh)))
    else:
        candidate = g_act(_bounded(form, xh + (r * h) @ rh.t() + bh))
    new = (1 - z) * candidate + z * h
    return new, c if c.shape[-1] == size else new


def _rnn_step(form: Form, d: int, x: Tensor, rb: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    activation = _ACTIVATIONS[form.activations[d][0]]
    return activation(_bounded(form, x + h @ form.r[d].t() + rb)), c
