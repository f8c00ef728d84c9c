"""The TPU kernels by the real compiler for a v5e, without a TPU: make test-tpu-aot installs what that takes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import gpu_model
from benchmarks.gpu_model import Shape
from sparse_jax import kernels
from sparse_jax.kernels import compile_only
from sparse_jax.kernels.reference import Geometry
from sparse_jax.kernels.tpu import operations
from tests.lowered import check_compiled, needs_compiler, steps

pytestmark = needs_compiler('tpu')
BLOCK = (128, 128)
SHAPES = {
    'matrix': (Shape((8192, 1, 1, 1024), (1, 1, 1024, 1024)), jnp.bfloat16),
    'edges, float32': (Shape((500, 1, 1, 1000), (1, 1, 1000, 300)), jnp.float32),
    '3x3': (Shape((64, 8, 8, 256), (3, 3, 256, 256), Geometry(padding=((1, 1), (1, 1)))), jnp.bfloat16),
    '3x3 at a stride': (Shape((64, 8, 8, 256), (3, 3, 256, 256), Geometry((2, 2), ((1, 1), (1, 1)))), jnp.bfloat16),
}


@pytest.mark.parametrize('name', SHAPES)
def test_every_kernel_compiles(name):
    shape, dtype = SHAPES[name]
    place = SingleDeviceSharding(compile_only.devices('tpu')[0])
    of = lambda s, kind=dtype: jax.ShapeDtypeStruct(s, kind, sharding=place)
    x, w, dy = of(shape.x), of(shape.w), of(shape.y)
    pattern = kernels.make_pattern(gpu_model.random_mask(shape, BLOCK, 0.3), block=BLOCK)
    pattern = jax.tree.map(lambda a: of(a.shape, a.dtype), pattern)
    geometry = shape.geometry
    programs = {
        'forward': (functools.partial(operations.forward, geometry=geometry), (x, w, pattern)),
        'input_gradient': (functools.partial(operations.input_gradient, geometry=geometry, x_shape=shape.x), (dy, w, pattern)),
        'weight_gradient': (functools.partial(operations.weight_gradient, geometry=geometry, w_shape=shape.w), (x, dy, pattern)),
        'scores': (lambda x, dy: operations.block_scores(x, dy, shape.w, geometry, BLOCK), (x, dy)),
    }
    for kernel, (run, arguments) in programs.items():
        with kernels.lowering_for('tpu'):
            lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=('tpu',))
        assert f'sparse_jax_{kernel}' in lowered.as_text()
        assert 'tpu_custom_call' in lowered.compile().as_text()


@pytest.mark.parametrize('name', steps)
def test_whole_training_steps_compile_and_their_collectives_are_counted(name):
    check_compiled(steps[name]('tpu'))
