"""The TPU kernels by the real compiler for a v5e, without a TPU: make test-tpu-aot installs what that takes."""

import jax.numpy as jnp
import pytest

from benchmarks.tpu import kernels
from tests.aot.lowered import check_compiled, needs_compiler, steps

pytestmark = needs_compiler('tpu')


@pytest.mark.parametrize('case', kernels.CASES, ids=lambda case: f'{case[0].name}, {jnp.dtype(case[1]).name}')
@pytest.mark.parametrize('kernel', kernels.KERNELS)
def test_every_kernel_compiles(kernel, case):
    compiled = kernels.compiled(kernel, *case)
    assert compiled.kernel and f'sparse_jax_{kernel}' in compiled.text


@pytest.mark.parametrize('name', steps)
def test_whole_training_steps_compile_and_their_collectives_are_counted(name):
    check_compiled(steps[name]('tpu'))
