"""The rivals of benchmarks/steps/train_step.py train alike: their losses over three steps are equal to PyTorch's in tests/golden.

Those were recorded by `python -m benchmarks.steps.train_step --golden=tests/golden/torch_losses.json --torch_python=PYTHON`.
"""

import json
import pathlib

import numpy as np
import pytest

from benchmarks.steps import train_step, twins

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'torch_losses.json').read_text())


# VGG-D ends in images of 1x1 pixels, normalised over 16 examples: its third loss in plain jax.lax differs by 4% between float32 and float64.
TOLERANCE = {'vgg_d': 0.05, 'wrn_16_8': 1e-4, 'lenet5': 1e-5, 'lm_tiny': 1e-5}


@pytest.mark.parametrize('name', twins.MODELS)
@pytest.mark.slow
def test_the_twins_have_the_same_losses_over_three_steps(name):
    golden = GOLDEN[name]
    batch, params = twins.batch(name, golden['batch_size']), twins.parameters(name)
    ours = train_step.Ours(name, 'dense', 1.0, batch, params)
    losses = [ours() for _ in range(3)]
    np.testing.assert_allclose(losses[0], golden['losses'][0], rtol=1e-5)
    np.testing.assert_allclose(losses, golden['losses'], rtol=TOLERANCE[name])
    if name in ('lenet5', 'lm_tiny'):  # compiling the plain VGG and WRN takes half a minute
        plain = train_step.Plain(name, batch, params)
        np.testing.assert_allclose([plain() for _ in range(3)], golden['losses'], rtol=TOLERANCE[name])
    else:
        forward = twins.forward_loss(name)(params, batch)
        np.testing.assert_allclose(forward, golden['losses'][0], rtol=1e-4)


@pytest.mark.slow
def test_the_sparse_twin_is_sparse_and_updates_its_masks_when_told():
    batch, params = twins.batch('lenet5', 4), twins.parameters('lenet5')
    sparse = train_step.Ours('lenet5', 'sparse_momentum', 0.05, batch, params, kernels='dense')
    sparse()
    masks = [np.asarray(m) for m in _masks(sparse)]
    sparse()
    assert all((a == b).all() for a, b in zip(masks, _masks(sparse), strict=True))
    sparse.before_an_update()
    sparse()
    assert any((a != b).any() for a, b in zip(masks, _masks(sparse), strict=True))
    assert sparse.density() == pytest.approx(0.05, abs=1e-4)
    for mask, param in zip(_masks(sparse), _leaves(sparse.state.params), strict=True):
        assert mask.ndim == 0 or not np.asarray(param)[~np.asarray(mask)].any()


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _masks(ours):
    import sparse_jax as sj

    return _leaves(sj.get_masks(ours.state.opt_state))
