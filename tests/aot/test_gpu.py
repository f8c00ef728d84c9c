"""The Hopper kernels by the real compiler, without a GPU: machine code, registers, spills, shared memory, and whole training steps.

make test-gpu-aot [PYTHON=python3.12] installs what that takes.
"""

import math

import pytest

from benchmarks.gpu import machine_code, model, program, step
from configs import cifar10_vgg_d, lm_tiny
from sparse_jax.aot import hlo, lowering
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.plan import hardware, memory, network
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.step_time import Choice
from tests.aot.lowered import check_compiled, compact_steps, needs_compiler, steps

pytestmark = needs_compiler('gpu')
CASES = list(machine_code.cases())
PRODUCT = {'forward': 'product', 'input_gradient': 'product'}


@pytest.mark.parametrize('case', CASES, ids=lambda case: f'{case[0]} {case[1].name} {case[2][0]}x{case[2][1]}')
def test_no_spills_tensor_cores_and_bytes_as_modelled(case):
    kernel, shape, block, config = case
    code = machine_code.compiled(*case)
    assert code.spills == 0 and code.registers <= 255
    assert code.shared_memory - config_lib.BARRIERS <= config.bytes(kernel, block) <= config_lib.SHARED_MEMORY - config_lib.BARRIERS
    assert code.tensor_core.startswith('wgmma.mma_async.sync.aligned.m64n') and '.f32.bf16.bf16' in code.tensor_core
    assert code.bulk_loads >= 2 and config.num_stages >= 3
    traced = model.step(kernel, shape, block, config)
    assert (code.step_operations, code.step_bytes) == (traced.operations, traced.bytes)
    # kernels.md's model: both tiles of a step, and the products of all their elements
    inputs, outputs = block
    if kernel in PRODUCT:
        unit_k, block_n = (inputs, outputs) if kernel == 'forward' else (outputs, inputs)
        block_k = min(unit_k, config.block_k)
        modelled = 2 * config.block_m * block_k * block_n, 2 * block_k * (config.block_m + block_n)
    else:
        windows = config_lib.window_rows(kernel, inputs) * config.units_per_program
        modelled = 2 * config.block_m * windows * outputs, 2 * config.block_m * (windows + outputs)
    for counted, expected in zip((code.step_operations, code.step_bytes), modelled, strict=True):
        assert abs(counted - expected) <= 0.1 * expected


@pytest.mark.parametrize(
    'case',
    [case for case in CASES if case[0] != 'scores' and case[2] == (64, 64)],
    ids=lambda case: f'{case[0]} {case[1].name} {case[2][0]}x{case[2][1]}',
)
def test_kernels_of_compact_values_compile_to_the_same_loop(case):
    code, dense = machine_code.compiled(*case, is_compact=True), machine_code.compiled(*case)
    assert code.spills == 0 and code.registers <= 255 and code.bulk_loads >= 2
    assert code.shared_memory <= config_lib.SHARED_MEMORY
    assert (code.step_operations, code.step_bytes, code.tensor_core) == (dense.step_operations, dense.step_bytes, dense.tensor_core)


def test_compact_storage_writes_gradients_and_moments_of_existing_units_only():
    moved = {}
    for name in ('rigl', 'rigl/compact'):
        config = step.settings('lm_2048', name, 0.1, 64)
        config.model.depth, config.model.features, config.model.heads, config.data.length = 2, 512, 4, 256
        kernels = program.kernels(lowering.lower(config, 'cuda').compiled_text)
        gradients = [kernel for kernel in kernels if kernel.kind == 'weight_gradient']
        assert sum(kernel.count for kernel in gradients) == 14
        if name == 'rigl/compact':  # parts of units, of which there are a tenth, the longest list filled up to eight
            assert all(len(kernel.shapes[-1]) == 4 and kernel.shapes[-1][1] <= 16 for kernel in gradients)
        moved[name] = sum(kernel.count * kernel.bytes for kernel in kernels if kernel.part == 'optimizer')
    assert moved['rigl/compact'] <= 0.15 * moved['rigl']  # with the embedding, which is dense in both


@pytest.mark.parametrize('block', ((32, 32), (64, 64), (128, 128)))
@pytest.mark.parametrize('kernel', model.KERNELS)
def test_every_config_of_the_sweep_compiles_without_spills(kernel, block):
    shape = model.SHAPES[0]
    for config in config_lib.candidates(kernel, block, shape.x[0])[::5]:  # a fifth of them here; the sweep on a GPU has all
        code = machine_code.compiled(kernel, shape, block, config, 'float16')
        assert code.spills == 0, config
        assert code.shared_memory <= config_lib.SHARED_MEMORY


def test_too_large_tiles_are_refused_by_the_compiler_as_by_the_rule():
    config = config_lib.Config(block_m=256, num_stages=6)
    assert not config.fits('forward', (128, 128))
    with pytest.raises(ValueError, match='shared memory'):
        machine_code.compiled('forward', model.SHAPES[0], (128, 128), config)


@pytest.mark.parametrize('name', (*steps, *compact_steps))
def test_whole_training_steps_compile_and_their_collectives_are_counted(name):
    check_compiled((steps | compact_steps)[name]('cuda'))


@pytest.mark.parametrize('method', ('dense', 'sparse_momentum'))
def test_a_transformers_step_keeps_neither_scores_nor_activations_in_float32(method):
    config = step.settings('lm_2048', method, 0.2, 64)
    config.model.depth, config.model.features, config.model.heads, config.data.length = 2, 512, 4, 256
    lowered = lowering.lower(config, 'cuda')
    kernels = program.kernels(lowered.compiled_text)
    assert {kernel.part for kernel in kernels} >= {'attention', 'optimizer', 'normalisation and activations'}
    assert sum(kernel.count for kernel in kernels if kernel.kind) == (0 if method == 'dense' else 42)
    tokens, length = config.data.batch_size * config.data.length, config.data.length  # more of them than any weight has rows
    for _, row, _ in hlo.executed(hlo.parse(lowered.compiled_text)):
        for kind, sizes in hlo.arrays(row.shape):
            assert sizes[-2:] != (length, length), row.path
            is_kept = 'transpose(' not in row.path  # else of the backward pass
            assert not (is_kept and kind == 'f32' and math.prod(sizes) >= tokens * 512), (row.path, sizes)


@pytest.mark.parametrize('name', ['vgg_d', 'lm_tiny'])
def test_peak_memory_by_the_planners_formula_is_within_a_quarter_of_the_compilers(name):
    config = {'vgg_d': cifar10_vgg_d, 'lm_tiny': lm_tiny}[name].get_config()
    if name == 'lm_tiny':
        config.model.dtype, config.model.features, config.model.heads = 'bfloat16', 512, 8
    config.mesh.data = config.mesh.model = 1
    parts = lowering.lower(config, 'cuda').memory
    assert parts is not None
    compiled = parts['arguments'] + parts['results'] - parts['of these in place'] + parts['temporary']
    planned = memory.memory(network.of_config(config), hardware.devices()['H100'], Choice(Mesh(1, 1)))
    assert 0.75 <= planned.peak / compiled <= 1.25
    assert planned.state == pytest.approx(parts['arguments'], rel=0.02), 'the state, and a batch'
