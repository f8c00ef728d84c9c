"""The TPU kernels in Pallas' interpreter, against float64."""

import jax.numpy as jnp
import pytest

from tests.kernels.block_cases import NONE, SAME, errors, matrix, rounding, score_error

BF16, F32 = jnp.bfloat16, jnp.float32
CASES = {
    'edges, tokens that fill no tile': (matrix(100, 150, 600), BF16),
    'float32': (matrix(64, 256, 256), F32),
    'nothing at all': (matrix(16, 128, 128, 0.0), BF16),
    'everything': (matrix(16, 256, 128, 1.0), F32),
    '3x3': ((8, 3, 4, 128, 400, (3, 3), (1, 1), SAME, (1, 1), 0.4), F32),
    '3x3 at a stride': ((8, 5, 4, 130, 128, (3, 3), (2, 2), ((1, 1), (0, 1)), (1, 1), 0.4), BF16),
    '1x1 at a stride': ((8, 4, 4, 128, 400, (1, 1), (2, 2), NONE, (1, 1), 0.5), BF16),
}


@pytest.mark.parametrize('name', CASES)
def test_products_and_both_gradients_equal_float64(name):
    case, dtype = CASES[name]
    assert max(errors(case, (128, 128), 'tpu', dtype)) <= max(rounding(dtype), 1e-6)


@pytest.mark.parametrize('name', ('edges, tokens that fill no tile', '3x3 at a stride'))
def test_block_scores_equal_float64(name):
    case, dtype = CASES[name]
    assert score_error(case, (128, 128), 'tpu', dtype) < 1e-6
