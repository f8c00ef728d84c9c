"""Networks written and read, against independent readers: safetensors, numpy, scipy, and products by hand."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj

CASES = {  # shape, granularity, type
    'single weights': ((6, 10), 'unstructured', np.float32),
    'nothing': ((4, 4), 'unstructured', np.float32),
    'blocks with edges': ((10, 7), 'block:4x4', np.float32),
    'a convolution': ((3, 3, 6, 8), 'unstructured', np.float16),
    'a convolution in blocks': ((3, 3, 6, 8), 'block:2x4', ml_dtypes.bfloat16),
    'whole kernels': ((3, 3, 6, 8), 'block:2x2:kernel', np.float32),
    'stacked layers': ((3, 8, 12), 'block:4x4', np.float64),
}


def _network(name, seed=0):
    shape, granularity, dtype = CASES[name]
    random, units = np.random.default_rng(seed), sj.granularity.get(granularity)
    density = 0.0 if name == 'nothing' else 0.4
    exists = random.random(units.unit_shape(shape)) < density
    mask = np.asarray(units.expand(jnp.asarray(exists), shape))
    kernel = np.where(mask, random.standard_normal(shape), 0).astype(dtype)
    params = {'fc': {'kernel': kernel, 'bias': random.standard_normal(3).astype(dtype)}, 'count': np.int32(7)}
    return params, {'fc': {'kernel': mask, 'bias': np.asarray(True)}, 'count': np.asarray(True)}, granularity


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize('suffix', ['npz', 'safetensors'])
@pytest.mark.parametrize('name', CASES)
def test_round_trips_are_exact(name, suffix, tmp_path):
    params, masks, granularity = _network(name)
    path, info = tmp_path / f'network.{suffix}', {'accuracy': 0.9, 'classes': ['a', 'b']}
    sj.export.save(path, params, masks, info, granularity=granularity)
    for like in (None, params, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))):
        found = sj.export.load(path, like)
        _equal(found[0], params)
        _equal(found[1], masks)
        assert found[2] == info
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(CASES)))
def test_compact_leaves_hold_the_existing_units_only(seed, name):
    from sparse_jax.export import leaves

    params, masks, granularity = _network(name, seed)
    kernel, mask, units = params['fc']['kernel'], masks['fc']['kernel'], sj.granularity.get(granularity)
    values, indices = leaves.compress(kernel, mask, units, 'kernel')
    np.testing.assert_array_equal(leaves.expand(values, indices, units, kernel.shape), kernel)
    rows, columns = units.sides
    taps = units.expand(units.collapse(jnp.asarray(mask), False, jax.lax.bitwise_or), kernel.shape)
    count = sum(
        bool(np.asarray(taps).reshape(-1, *kernel.shape[-2:])[tap, i : i + rows, j : j + columns].any())
        for tap in range(int(np.prod(kernel.shape[:-2])))
        for i in range(0, kernel.shape[-2], rows)
        for j in range(0, kernel.shape[-1], columns)
    )
    assert len(indices) == count and values.size == count * rows * columns


def test_a_weight_that_exists_and_is_zero_still_exists(tmp_path):
    kernel, mask = np.array([[0.0, 2.0], [0.0, 0.0]], np.float32), np.array([[True, True], [False, False]])
    sj.export.save(tmp_path / 'a.npz', {'kernel': kernel}, {'kernel': mask})
    np.testing.assert_array_equal(sj.export.load(tmp_path / 'a.npz')[1]['kernel'], mask)
    sj.export.save(tmp_path / 'b.npz', {'kernel': kernel}, {'kernel': mask}, dense=True)
    np.testing.assert_array_equal(sj.export.load(tmp_path / 'b.npz')[1]['kernel'], kernel != 0)
    assert sj.export.to_bcoo({'kernel': kernel}, {'kernel': mask})['kernel'].nse == 2
    assert sj.export.to_scipy({'kernel': kernel}, {'kernel': mask})['kernel'].nnz == 2


def test_other_readers_find_what_is_in_a_file(tmp_path):
    params, masks, granularity = _network('blocks with edges')
    kernel = params['fc']['kernel']
    sj.export.save(tmp_path / 'a.safetensors', params, masks, granularity=granularity)
    arrays = safetensors.numpy.load_file(tmp_path / 'a.safetensors')
    assert sorted(arrays) == ['count', 'fc/bias', 'fc/kernel.indices', 'fc/kernel.values']
    with safetensors.safe_open(tmp_path / 'a.safetensors', 'np') as file:
        header = json.loads(file.metadata()['sparse_jax'])
    assert header['leaves']['fc/kernel'] == {'shape': [10, 7], 'dtype': 'float32', 'granularity': 'block:4x4'}
    for block, place in zip(arrays['fc/kernel.values'], arrays['fc/kernel.indices'], strict=True):
        row, column = divmod(int(place), 2)  # of 3 x 2 blocks
        part = kernel[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(block[: part.shape[0], : part.shape[1]], part)
    sj.export.save(tmp_path / 'dense.safetensors', params, masks, dense=True)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / 'dense.safetensors')['fc/kernel'], kernel)


def test_a_trained_network_is_smaller_in_a_file(tmp_path):
    params = {'kernel': jax.random.normal(jax.random.key(0), (256, 256))}
    state = sj.sparsify(optax.sgd(0.1, 0.9), density=0.05, update_every=10, total_steps=100).init(params)
    masks = sj.get_masks(state)
    sj.export.save(tmp_path / 'a.npz', sj.apply_masks(params, masks), masks)
    assert (tmp_path / 'a.npz').stat().st_size < 0.05 * 256 * 256 * 8 + 2000  # a value and an index each
    assert int(sj.export.load(tmp_path / 'a.npz')[1]['kernel'].sum()) == int(masks['kernel'].sum())


@pytest.mark.parametrize('name', ['single weights', 'a convolution', 'stacked layers'])
def test_scipy_and_bcoo_multiply_as_the_network_does(name):
    params, masks, _ = _network(name)
    kernel = params['fc']['kernel'].astype(np.float64)
    stacked = (lambda path, _: True) if name == 'stacked layers' else None
    found = sj.export.to_scipy(params, masks, stacked=stacked)['fc']
    np.testing.assert_array_equal(found['bias'], params['fc']['bias'])
    layers = zip(found['kernel'], kernel, strict=True) if stacked else [(found['kernel'], kernel)]
    for matrix, weight in layers:
        x = np.random.default_rng(1).standard_normal(weight.shape[:-1])
        expected = np.tensordot(x, weight, weight.ndim - 1)  # a convolution at one place: its patch
        np.testing.assert_allclose(matrix @ x.reshape(-1), expected, rtol=1e-3)
        assert matrix.format == 'csr' and matrix.has_sorted_indices
    leaf = sj.export.to_bcoo(params, masks)['fc']['kernel']
    np.testing.assert_array_equal(np.asarray(leaf.todense(), np.float64), kernel.astype(leaf.dtype))
    assert leaf.nse == masks['fc']['kernel'].sum()


def test_layouts_of_pytorch():
    random = np.random.default_rng(0)
    oihw, linear = random.standard_normal((8, 4, 3, 3)).astype(np.float32), random.standard_normal((5, 8)).astype(np.float32)
    oihw[random.random(oihw.shape) < 0.8] = 0
    state = {
        'conv.weight': oihw,
        'norm.weight': np.ones(8),
        'norm.running_var': np.ones(8),
        'norm.num_batches_tracked': 3,
        'fc.weight': linear,
    }
    like = {'conv': {'kernel': np.zeros((3, 3, 4, 8), np.float32)}, 'fc': {'kernel': np.zeros((8, 5), np.float32)},
            'norm': {'scale': np.zeros(8), 'var': np.zeros(8)}}  # fmt: skip
    params, masks = sj.export.from_torch_state(state, like, dense=['fc/*'])
    assert params['conv']['kernel'][2, 1, 3, 7] == oihw[7, 3, 2, 1] and params['fc']['kernel'][6, 4] == linear[4, 6]
    assert masks['conv']['kernel'].sum() == np.count_nonzero(oihw) and masks['fc']['kernel'].ndim == 0
    back = sj.export.to_torch_state(params)
    assert all(np.array_equal(back[name], np.asarray(state[name])) and back[name].flags.c_contiguous for name in back)
    tx = sj.sparsify(optax.sgd(0.1), density=0.2, update_every=5, total_steps=10, dense=['fc/*'])
    sj.check_sparse(params, sj.set_masks(tx.init(params), masks))
    names = {'conv/kernel': 'c', 'fc/kernel': 'f', 'norm/scale': 's', 'norm/var': 'v'}
    assert set(sj.export.to_torch_state(params, names)) == {'c', 'f', 's', 'v'}
    assert set(sj.export.to_torch_state(params, lambda path: f'net.{path}')) == {f'net.{path}' for path in names}
    with pytest.raises(ValueError, match=r"names: has no name for 'fc/kernel'"):
        sj.export.to_torch_state(params, {'conv/kernel': 'c'})
    with pytest.raises(ValueError, match='two leaves get the same name'):
        sj.export.to_torch_state(params, lambda _: 'x')


@pytest.mark.parametrize('change, message', [
    ({'fc.weight': None}, 'fc.weight is missing'),
    ({'head.weight': np.zeros(2)}, 'head.weight is not wanted'),
    ({'fc.weight': np.zeros((2, 3))}, r'fc.weight has shape \(2, 3\) instead of \(3, 2\)'),
])  # fmt: skip
def test_a_state_of_another_network_is_told(change, message):
    state = {name: value for name, value in ({'fc.weight': np.zeros((3, 2))} | change).items() if value is not None}
    with pytest.raises(ValueError, match=f'the state is of another network: .*{message}'):
        sj.export.from_torch_state(state, {'fc': {'kernel': np.zeros((2, 3))}})


def test_bad_input_is_told_and_leaves_nothing(tmp_path):
    kernel, mask = np.eye(4, dtype=np.float32), np.eye(4) > 0
    save = lambda path, params=None, masks=None, *rest, **more: sj.export.save(
        tmp_path / path, params or {'w': kernel}, masks or {'w': mask}, *rest, **more
    )
    for call, message in (
        (lambda: save('a.pt'), r"a.pt': its suffix must be .npz or .safetensors"),
        (lambda: save('a.npz', None, {'v': mask}), 'masks: must be a tree like params'),
        (lambda: save('a.npz', None, {'w': mask[:2]}), r"masks: 'w' must be bool\[4, 4\] or a scalar, got bool\[2, 4\]"),
        (lambda: save('a.npz', {'w': kernel + 1}), "params: 'w' has 12 weights off its mask that are not zero: apply them first"),
        (
            lambda: save('a.npz', granularity='block:2x2'),
            "granularity: the mask of 'w' has units that exist in part, so it is not made of",
        ),
        (
            lambda: save('a.npz', None, None, {'f': print}),
            'info: Object of type builtin_function_or_method is not JSON serializable',
        ),
        (lambda: save('none/a.npz'), 'cannot be written .No such file'),
        (lambda: sj.export.load(tmp_path / 'a.npz'), 'a.npz is not a file'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    save('a.npz')
    with pytest.raises(ValueError, match=r'a.npz is of another network: v is missing; w is not wanted'):
        sj.export.load(tmp_path / 'a.npz', {'v': kernel})
    for damaged in (b'', b'PK\x03\x04', (tmp_path / 'a.npz').read_bytes()[:-40], b'{}'):
        for name in ('b.npz', 'b.safetensors'):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf'{name} cannot be read .*it is damaged, or not from'):
                sj.export.load(tmp_path / name)
    np.savez(tmp_path / 'c.npz', x=kernel)
    with pytest.raises(ValueError, match='c.npz cannot be read'):
        sj.export.load(tmp_path / 'c.npz')


def test_scipys_matrices_of_other_layouts():
    rng = np.random.default_rng(0)
    params = {'query': rng.normal(size=(16, 4, 8)).astype(np.float32), 'fc': rng.normal(size=(6, 8)).astype(np.float32)}
    masks = {name: rng.random(leaf.shape) < 0.3 for name, leaf in params.items()}
    params = {name: np.where(masks[name], leaf, 0) for name, leaf in params.items()}
    axes = {'query': ((0,), (1, 2)), 'fc': ((1,), (0,))}
    found = sj.export.to_scipy(params, masks, matrix_axes=lambda path, leaf: axes[path])
    x = rng.normal(size=(16,)).astype(np.float32)
    np.testing.assert_allclose(found['query'] @ x, np.einsum('i,ihd->hd', x, params['query']).ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found['fc'] @ x[:8], params['fc'] @ x[:8], rtol=1e-5, atol=1e-6)
