"""Shapes of broadcasting nodes are what ONNX's own inference says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnx_refit.model.graph import Names
from onnx_refit.plan.program import _ELEMENTWISE, NotStaticError, ProgramBuilder
from onnx_refit.tensors import TensorSpec

SPECS = st.tuples(
    st.sampled_from(["float32", "float32", "float16", "float64", "int64"]),
    st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(_ELEMENTWISE)), st.sampled_from([7, 13, 17, 21]), st.data())
def test_it_is_what_onnx_infers(op_type: str, version: int, data: st.DataObject) -> None:
    builder = ProgramBuilder([helper.make_opsetid("", version)], 9, Names(set()))
    names = [f"i{k}" for k in range(_ELEMENTWISE[op_type])]
    for name in names:
        dtype, shape = data.draw(SPECS)
        builder.add_source(TensorSpec(name, dtype, shape))
    node = helper.make_node(op_type, names, ["o"])
    quick = builder._infer_elementwise(node)
    if quick is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramBuilder, "_infer_elementwise", lambda *_: None)
        try:
            (thorough,) = builder.infer(node)
        except NotStaticError as error:
            raise AssertionError(f"{quick} although {error}") from error
    assert quick == thorough
