"""Bytes and operations of a compiled program, against counts by hand."""

import pytest

from benchmarks.gpu import program

TEXT = """HloModule jit_step

%copied (p0: f32[4,8,16], p1: s32[], p2: f32[8,16]) -> f32[4,8,16] {
  %p0 = f32[4,8,16]{2,1,0} parameter(0)
  %p2 = f32[8,16]{1,0} parameter(2)
  %row = f32[1,8,16]{2,1,0} bitcast(%p2)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %update = f32[4,8,16]{2,1,0} dynamic-update-slice(%p0, %row, %p1, %zero, %zero)
}

%sliced (p0.1: f32[4,8,16], p1.1: s32[]) -> (f32[8,16], f32[8]) {
  %p0.1 = f32[4,8,16]{2,1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%p0.1, %p1.1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,16}
  %flat = f32[8,16]{1,0} bitcast(%slice)
  %double = f32[8,16]{1,0} add(%flat, %flat)
  %sum = f32[8]{0} reduce(%double, %zero.1), dimensions={1}, to_apply=%add
  ROOT %both = (f32[8,16]{1,0}, f32[8]{0}) tuple(%double, %sum)
}

%multiplied (p0.2: bf16[32,8], p1.2: bf16[8,16]) -> bf16[32,16] {
  %p0.2 = bf16[32,8]{1,0} parameter(0)
  %p1.2 = bf16[8,16]{1,0} parameter(1)
  ROOT %dot = bf16[32,16]{1,0} dot(%p0.2, %p1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carry: (s32[], f32[4,8,16])) -> (s32[], f32[4,8,16]) {
  %carry = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[4,8,16]{2,1,0} get-tuple-element(%carry), index=1
  %read = (f32[8,16]{1,0}, f32[8]{0}) fusion(%stack, %i), kind=kLoop, calls=%sliced
  %value = f32[8,16]{1,0} get-tuple-element(%read), index=0
  %written = f32[4,8,16]{2,1,0} fusion(%stack, %i, %value), kind=kLoop, calls=%copied
  ROOT %next = (s32[], f32[4,8,16]{2,1,0}) tuple(%i, %written)
}

%condition (carry.1: (s32[], f32[4,8,16])) -> pred[] {
  %carry.1 = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: bf16[32,8], w: bf16[8,16], start: (s32[], f32[4,8,16])) -> bf16[32,16] {
  %x = bf16[32,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %start = (s32[], f32[4,8,16]{2,1,0}) parameter(2)
  %loop = (s32[], f32[4,8,16]{2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %copy = bf16[8,16]{0,1} copy(%w)
  ROOT %y = bf16[32,16]{1,0} fusion(%x, %copy), kind=kCustom, calls=%multiplied
}
"""


def test_bytes_and_operations_by_hand():
    rows = {kernel.name: kernel for kernel in program.kernels(TEXT)}
    row, index = 4 * 8 * 16, 4
    # one layer's part is read of the stack, its double and its sums are written
    assert (rows['read'].count, rows['read'].bytes) == (4, row + index + row + 4 * 8)
    # one row is read and written in place; the stack itself is not touched
    assert (rows['written'].count, rows['written'].bytes) == (4, row + index + row)
    assert rows['written'].part == 'copies'
    assert (rows['copy'].count, rows['copy'].bytes, rows['copy'].part) == (1, 2 * 2 * 8 * 16, 'copies')
    assert (rows['y'].operations, rows['y'].bytes) == (2 * 32 * 8 * 16, 2 * (32 * 8 + 8 * 16 + 32 * 16))
    assert rows['y'].part == 'dense products' and len(rows) == 4


def test_a_custom_call_without_a_formula_is_an_error():
    text = """ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} custom-call(%x), custom_call_target="nobody_knows"
}"""
    with pytest.raises(ValueError, match='y: custom calls to nobody_knows have no formula'):
        program.kernels(text)


def test_a_sparse_product_is_known_by_its_name():
    text = """ENTRY %main (x: bf16[64,1,32], w: bf16[1,32,48], i: s32[4]) -> bf16[64,1,48] {
  %x = bf16[64,1,32]{2,1,0} parameter(0)
  %w = bf16[1,32,48]{2,1,0} parameter(1)
  %i = s32[4]{0} parameter(2)
  ROOT %y = bf16[64,1,48]{2,1,0} custom-call(%x, %w, %i), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/sparse_jax_forward/pallas_call"}
}"""
    (kernel,) = program.kernels(text)
    assert (kernel.part, kernel.kind) == ('sparse products', 'forward')
    assert kernel.shapes == ((64, 1, 32), (1, 32, 48), (4,), (64, 1, 48))


@pytest.mark.parametrize(('target', 'operands', 'result'), [
    ('Forward', ('bf16[2,8,8,16]{3,2,1,0}', 'bf16[32,3,3,16]{3,2,1,0}'), 'bf16[2,8,8,32]{3,2,1,0}'),
    ('BackwardInput', ('bf16[2,8,8,32]{3,2,1,0}', 'bf16[32,3,3,16]{3,2,1,0}'), 'bf16[2,8,8,16]{3,2,1,0}'),
    ('BackwardFilter', ('bf16[2,8,8,16]{3,2,1,0}', 'bf16[2,8,8,32]{3,2,1,0}'), 'bf16[32,3,3,16]{3,2,1,0}'),
])  # fmt: skip
def test_convolutions_by_hand(target, operands, result):
    text = f"""ENTRY %main (a: {operands[0]}, b: {operands[1]}) -> {result} {{
  %a = {operands[0]} parameter(0)
  %b = {operands[1]} parameter(1)
  %both = ({result}, u8[1000]{{0}}) custom-call(%a, %b), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{target}"
  ROOT %y = {result} get-tuple-element(%both), index=0
}}"""
    (kernel,) = program.kernels(text)
    assert kernel.operations == 2 * (2 * 8 * 8) * (32 * 3 * 3 * 16) and kernel.part == 'dense products'
    assert kernel.bytes == 2 * (2 * 8 * 8 * 16 + 2 * 8 * 8 * 32 + 32 * 3 * 3 * 16)
