"""Sparse products against float64, their patterns, the measured choice and the window of dense gradients."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax import kernels
from sparse_jax.kernels import backend, measure, reference
from sparse_jax.kernels.cpu import operations as cpu
from tests.kernels import kernel_cases

pytestmark = pytest.mark.core
needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')


@needs_compiler
@settings(max_examples=20)
@given(st.sampled_from(kernel_cases.CASES), st.integers(0, 2**31 - 1), st.sampled_from(('reference', 'cpu')))
def test_products_and_both_gradients_equal_float64(case, seed, implementation):
    _, wrong = kernel_cases.errors(case, implementation, seed)
    assert max(wrong) < 2e-6


@needs_compiler
@pytest.mark.parametrize('case', kernel_cases.EXTREMES, ids=str)
def test_extreme_extents_equal_float64(case):
    _, wrong = kernel_cases.errors(case, 'cpu')
    assert max(wrong) < 2e-6


@needs_compiler
@pytest.mark.parametrize('extents', [(0, 4, 4, 3, 5), (2, 0, 4, 3, 5), (2, 4, 0, 3, 5), (2, 4, 4, 0, 5), (2, 4, 4, 3, 0)], ids=str)
def test_arrays_without_elements_have_the_results_of_the_reference(extents):
    n, height, width, inputs, outputs = extents
    mask = np.ones((3, 3, inputs, outputs), bool)
    pattern, geometry = kernels.make_pattern(np.ones((3, 3, 3, 5), bool)), reference.Geometry((1, 1), ((1, 1), (1, 1)))
    x, w = jnp.ones((n, height, width, inputs)), jnp.asarray(mask, jnp.float32)
    y = cpu.forward(x, w, pattern, geometry)
    np.testing.assert_array_equal(y, np.zeros(geometry.output_shape(x.shape, w.shape)))
    np.testing.assert_array_equal(cpu.input_gradient(y, w, pattern, geometry, x.shape), np.zeros(x.shape))
    np.testing.assert_array_equal(cpu.weight_gradient(x, y, pattern, geometry, w.shape), np.zeros(w.shape))


@needs_compiler
@pytest.mark.parametrize('block', [None, (4, 4)])
def test_lists_that_do_not_belong_to_the_weight_are_told(block):
    mask = np.kron(np.random.default_rng(0).random((4, 4)) < 0.5, np.ones((4, 4))) > 0
    pattern = kernels.make_pattern(mask, block=block)
    indices, pointers = np.asarray(pattern.transposed_indices), np.asarray(pattern.transposed_pointers)
    wrong = {
        'too few pointers': dict(transposed_pointers=pointers[:-2]),
        'its pointers leave its indices': dict(transposed_indices=indices[: pointers[-1] - 1]),
        'an index lies beyond': dict(transposed_indices=indices + 17),
    }
    w, x = jnp.asarray(mask, jnp.float32), jnp.ones((40, 16))
    product = jax.jit(lambda x, w, p: kernels.sparse_dot(x, w, p, implementation='cpu'))
    gradient = jax.jit(jax.grad(lambda w, x, p: product(x, w, p).sum()))
    for message, lists in {**wrong, 'an index lies beyond ': dict(transposed_indices=indices - 17)}.items():
        damaged = dataclasses.replace(pattern, **{name: jnp.asarray(array) for name, array in lists.items()})
        for run in (lambda p: product(x, w, p), lambda p: gradient(w, x, p)):
            with pytest.raises(
                jax.errors.JaxRuntimeError, match=f'the pattern does not belong to this weight: .*{message.strip()}'
            ):
                jax.block_until_ready(run(damaged))
    np.testing.assert_allclose(product(x, w, pattern), x @ w, rtol=1e-5)


@needs_compiler
@settings(max_examples=20)
@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20),
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.floats(0, 1),
)  # fmt: skip
def test_any_convolution_by_the_c_kernels(seed, batch, inputs, outputs, taps, strides, pad, density):
    """Shapes at random: nothing is compiled for a shape but the call, so there may be many."""
    height, width = 4 + seed % 5, 4 + seed % 3
    padding = ((pad[0], pad[1]), (pad[1], pad[0]))
    case = (batch, height, width, inputs, outputs, taps, strides, padding, (1, 1), density, None)
    x, mask, w, dy = kernel_cases.make(case, seed)
    pattern, geometry = kernels.make_pattern(mask), reference.Geometry(strides, padding)
    got = (
        cpu.forward(jnp.asarray(x), jnp.asarray(w), pattern, geometry),
        cpu.input_gradient(jnp.asarray(dy), jnp.asarray(w), pattern, geometry, x.shape),
        cpu.weight_gradient(jnp.asarray(x), jnp.asarray(dy), pattern, geometry, w.shape),
    )
    expected = list(kernel_cases.convolution(x, w, dy, strides, padding, (1, 1)))
    expected[2] = np.where(mask, expected[2], 0)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(np.abs(b).max(initial=0), 1))


@needs_compiler
@pytest.mark.parametrize('implementation', ('reference', 'cpu'))
def test_gradients_are_those_of_finite_differences(implementation):
    mask = np.random.default_rng(0).random((3, 3, 4, 5)) < 0.3
    pattern = kernels.make_pattern(mask)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    w = jnp.where(mask, jax.random.normal(jax.random.key(1), mask.shape), 0)
    product = lambda x, w: kernels.sparse_conv(x, w, pattern, strides=(2, 1), implementation=implementation)
    loss = lambda x, w: (jnp.sin(product(x, w)) ** 2).sum()
    dx, dw = jax.grad(loss, (0, 1))(x, w)
    for key in range(4):
        vx = jax.random.normal(jax.random.key(key), x.shape)
        vw = jnp.where(mask, jax.random.normal(jax.random.key(key + 9), w.shape), 0)
        step = 1e-2
        numeric = (loss(x + step * vx, w + step * vw) - loss(x - step * vx, w - step * vw)) / (2 * step)
        assert float(numeric) == pytest.approx(float((dx * vx).sum() + (dw * vw).sum()), rel=2e-2, abs=2e-2)


@needs_compiler
@needs_compiler
@pytest.mark.parametrize('implementation', ('reference', 'cpu'))
@pytest.mark.parametrize('case', ['matrix', 'convolution', 'blocks'])
def test_gradients_of_gradients_are_those_of_dense_products(case, implementation):
    rng = np.random.default_rng(0)
    if case == 'convolution':
        mask, x = rng.random((3, 3, 4, 5)) < 0.3, rng.standard_normal((2, 5, 5, 4), np.float32)
        sparse, dense = kernels.sparse_conv, kernels.convolve
    else:
        mask, x = rng.random((8, 12)) < 0.3, rng.standard_normal((6, 8), np.float32)
        mask = mask if case == 'matrix' else np.kron(mask[:2, :3], np.ones((4, 4))) > 0
        sparse, dense = kernels.sparse_dot, jnp.matmul
    pattern = kernels.make_pattern(mask, block=(4, 4) if case == 'blocks' else None)
    w = np.where(mask, rng.standard_normal(mask.shape, np.float32), 0)
    # tanh of both sides: every one of the nine second derivatives is there
    by_kernel = lambda x, w: jnp.sum(jnp.tanh(sparse(jnp.tanh(x), w, pattern, implementation=implementation)))
    by_xla = lambda x, w: jnp.sum(jnp.tanh(dense(jnp.tanh(x), jnp.where(mask, w, 0))))
    directions = rng.standard_normal(x.shape, np.float32), rng.standard_normal(w.shape, np.float32)

    def second_and_third(loss, x, w):
        product = lambda w: sum(map(jnp.vdot, directions, jax.grad(loss, (0, 1))(x, w)))
        second = jax.vjp(jax.grad(loss, (0, 1)), x, w)[1](directions)
        return *second, jax.grad(lambda w: jnp.sum(jax.grad(product)(w) ** 2))(w)

    of = jax.jit(second_and_third, static_argnums=0)
    for got, expected in zip(of(by_kernel, x, w), of(by_xla, x, w), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@needs_compiler
def test_forward_mode_is_refused_in_one_line():
    mask = np.eye(4, dtype=bool)
    product = lambda w: kernels.sparse_dot(jnp.ones((2, 4)), w, kernels.make_pattern(mask), implementation='cpu').sum()
    w = jnp.eye(4)
    for transform in (jax.jacfwd, lambda f: lambda w: jax.jvp(jax.grad(f), (w,), (w,))):
        with pytest.raises(NotImplementedError, match='derivatives in reverse mode, of any order'):
            transform(product)(w)


@needs_compiler
def test_matrix_products_of_any_rank_and_in_scans():
    masks = np.random.default_rng(0).random((3, 8, 8)) < 0.4
    masks[1] = False
    patterns = kernels.make_patterns({'w': masks}, stacked=lambda path, leaf: True)['w']
    w = jnp.where(masks, jax.random.normal(jax.random.key(0), masks.shape), 0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))

    def loss(w, implementation):
        def layer(x, row):
            return x + kernels.sparse_dot(x, *row, implementation=implementation), None

        return (jax.lax.scan(layer, x, (w, patterns))[0] ** 2).sum()

    dense = jax.grad(lambda w: (jax.lax.scan(lambda x, w: (x + x @ w, None), x, w)[0] ** 2).sum())(w)
    for implementation in ('reference', 'cpu'):
        got = jax.jit(jax.grad(loss), static_argnums=1)(w, implementation)
        np.testing.assert_allclose(got, np.where(masks, dense, 0), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_dense_gradients_differ_off_the_pattern_only():
    mask = np.random.default_rng(0).random((12, 7)) < 0.3
    w, x = jnp.where(mask, 0.5, 0.0), jax.random.normal(jax.random.key(0), (9, 12))
    for implementation in ('reference', 'cpu'):
        pattern = kernels.make_pattern(mask, implementation=implementation)
        loss = lambda w, p, **options: (kernels.sparse_dot(x, w, p, **options) ** 2).sum()
        sparse, whole = (np.asarray(jax.grad(loss)(w, pattern, dense_gradient=dense)) for dense in (False, True))
        by_pattern = jax.grad(loss)(w, kernels.with_dense_gradients(pattern))
        assert not sparse[~mask].any() and whole[~mask].all()
        np.testing.assert_allclose(whole, 2 * np.asarray(x).T @ np.asarray(x @ w), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sparse[mask], whole[mask], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(by_pattern, whole)


@needs_compiler
def test_products_follow_a_mask_update_without_compiling_anew():
    params = {'w': jax.random.normal(jax.random.key(0), (40, 30))}
    tx = sj.sparse_momentum(0.1, density=0.1, update_every=2, total_steps=100)
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    x, compiled, patterns = jax.random.normal(jax.random.key(1), (20, 40)), 0, None

    @jax.jit
    def grads(params, x, patterns):
        nonlocal compiled
        compiled += 1
        return jax.grad(lambda p, x: (kernels.sparse_dot(x, p['w'], patterns['w'], implementation='cpu') ** 2).sum(), (0, 1))(
            params, x
        )

    for _ in range(6):
        mask = np.asarray(sj.get_masks(state)['w'])
        patterns = kernels.make_patterns(sj.get_masks(state), previous=patterns)
        got, dx = grads(params, x, patterns)
        dense = 2 * x.T @ (x @ params['w'])
        np.testing.assert_allclose(got['w'], np.where(mask, dense, 0), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dx, 2 * (x @ params['w']) @ params['w'].T, rtol=1e-4, atol=1e-3)
        updates, state = tx.update({'w': dense}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert compiled == 1 and (mask != sj.get_masks(tx.init(params))['w']).any()


def test_a_pattern_stands_for_its_mask():
    random = np.random.default_rng(0)
    for shape, block in [((7, 5), None), ((3, 2, 6, 5), None), ((9, 10), (4, 3)), ((3, 3, 8, 6), (2, 2)), ((2, 2), None)]:
        rows, columns = block or (1, 1)
        units = random.random((*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))) < 0.4
        mask = np.repeat(np.repeat(units, rows, axis=-2), columns, axis=-1)[..., : shape[-2], : shape[-1]]
        pattern = kernels.make_pattern(mask, block=block)
        np.testing.assert_array_equal(reference.mask_of(pattern), mask)
        assert pattern.pointers[-1] == pattern.transposed_pointers[-1] == units.sum()
        again = kernels.make_pattern(mask, block=block, at_least=10_000)
        assert again.capacity == 10_000
        np.testing.assert_array_equal(reference.mask_of(again), mask)
    assert kernels.make_patterns({'a': jnp.array(True), 'b': np.ones((2, 3, 4), bool)}) == {'a': None, 'b': None}
    assert kernels.make_patterns({'a': mask}, implementations={'a': 'dense'}) == {'a': None}


def test_wrong_operands():
    mask = np.eye(4, dtype=bool)
    pattern, x, w = kernels.make_pattern(mask, name='fc1'), jnp.ones((2, 4)), jnp.eye(4)
    with pytest.raises(ValueError, match=r'w has shape \(4, 5\), its pattern is of shape \(4, 4\) \(layer fc1\)'):
        kernels.sparse_dot(x, jnp.ones((4, 5)), pattern)
    with pytest.raises(ValueError, match='x of shape .* has 3 features'):
        kernels.sparse_dot(jnp.ones((2, 3)), w, pattern)
    with pytest.raises(ValueError, match='one floating-point type, got bfloat16 and float32'):
        kernels.sparse_dot(x.astype(jnp.bfloat16), w, pattern)
    with pytest.raises(ValueError, match="implementation='gpuu' does not exist"):
        kernels.sparse_dot(x, w, pattern, implementation='gpuu')
    with pytest.raises(NotImplementedError, match="implementation='cpu' does not run here: it computes in float32"):
        kernels.sparse_dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), pattern, implementation='cpu')
    assert kernels.sparse_dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), pattern).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match='must come from make_pattern'):
        kernels.sparse_dot(x, w, mask)
    image, kernel, convolution = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)), kernels.make_pattern(np.ones((3, 3, 2, 2), bool))
    with pytest.raises(NotImplementedError, match='groups=2'):
        kernels.sparse_conv(image, kernel, convolution, groups=2)
    for options, message in (
        (dict(strides=(0, 1)), 'strides=.* integers of at least 1'),
        (dict(padding='SAMEE'), "padding='SAMEE' does not exist"),
        (dict(padding=((-1, 0), (0, 0))), 'padding=.* at least 0'),
        (dict(dilation=2), 'dilation=2 must be two integers'),
        (dict(strides=(1.9, 1)), r'strides=\(1.9, 1\) must be two integers'),
        (dict(padding=1), 'padding=1 must be pixels'),
        (dict(padding=((0.5, 1), (0, 0))), 'padding=.* must be pixels'),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.sparse_conv(image, kernel, convolution, **options)
    with pytest.raises(ValueError, match=r'boolean array of 2 axes .* got float32\[4, 4\]'):
        kernels.make_pattern(np.eye(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r'of shape \(0, 4\) is empty'):
        kernels.make_pattern(np.zeros((0, 4), bool))
    with pytest.raises(ValueError, match="implementations='fc2/kernl' does not exist. Did you mean 'fc2/kernel'"):
        kernels.make_patterns({'fc2': {'kernel': mask}}, implementations={'fc2/kernl': 'cpu'})
    with pytest.raises(ValueError, match='mask is traced'):
        jax.jit(lambda m: kernels.make_pattern(m))(mask)
    with pytest.raises(ValueError, match='of fc2 does not consist of whole blocks of 2x2: the block around'):
        kernels.make_pattern(mask, block=(2, 2), name='fc2')
    with pytest.raises(ValueError, match='blocks of 8x8 do not fit'):
        kernels.make_pattern(mask, block=(8, 8))


def test_weights_off_the_pattern_are_told_in_debug_mode(monkeypatch):
    monkeypatch.setenv('SPARSE_JAX_DEBUG', '1')
    pattern = kernels.make_pattern(np.eye(3, dtype=bool), name='fc1')
    kernels.sparse_dot(jnp.ones((1, 3)), jnp.eye(3), pattern)
    with pytest.raises(Exception, match='fc1 of shape .* has 6 nonzeros off its pattern'):
        jax.block_until_ready(jax.jit(lambda w: kernels.sparse_dot(jnp.ones((1, 3)), w, pattern))(jnp.ones((3, 3))))
        jax.effects_barrier()


@needs_compiler
def test_many_products_at_once_neither_wait_for_each_other_nor_crash_on_nan():
    """More products than threads, all independent: each does its work itself where no helper comes."""
    masks = np.random.default_rng(0).random((24, 64, 64)) < 0.2
    patterns = [kernels.make_pattern(m) for m in masks]
    x = jnp.full((256, 64), jnp.nan).at[0].set(1.0)

    @jax.jit
    def run(x, ws, patterns):
        return sum(kernels.sparse_dot(x, w, p, implementation='cpu') for w, p in zip(ws, patterns, strict=True))

    ws = [jnp.asarray(m, jnp.float32) for m in masks]
    for _ in range(20):
        y = run(x, ws, patterns)
    np.testing.assert_allclose(y[0], masks.sum(axis=(0, 1)), rtol=1e-6)
    assert np.isnan(y[1:]).all()


@needs_compiler
def test_measured_times_are_kept_by_shape_and_a_damaged_file_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    pattern = kernels.make_pattern(np.ones((3, 3, 4, 4), bool), name='conv')
    (call,) = measure.products_of(kernels.sparse_conv, jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 4)), pattern)
    assert call.name == 'conv' and call.x == (2, 6, 6, 4) and call.geometry.padding == ((1, 1), (1, 1))
    first = measure.measured(call, 0.0504)
    assert set(first) == {'dense', 'cpu'} and min(first.values()) > 0
    assert measure.measured(call, 0.0496) == first  # both are 5.0%
    assert measure.measured(call._replace(name='other'), 0.05) == first
    (tmp_path / 'measured.json').write_text('{"')
    assert measure.measured(call, 0.05) != first
    both = measure.measured(call, 0.05, dense_share=0.25)
    sparse, dense = measure.measured(call, 0.05), measure.measured(call, 0.05, dense_share=1.0)
    assert both['cpu'] == pytest.approx(0.75 * sparse['cpu'] + 0.25 * dense['cpu'])
    assert len(json.loads((tmp_path / 'measured.json').read_text())) == 2
    measure.measured(call._replace(input_gradient=False), 0.05)
    assert len(json.loads((tmp_path / 'measured.json').read_text())) == 3


def test_the_choice_takes_a_sparse_kernel_only_where_it_wins():
    assert backend.fastest({'dense': 1.0, 'cpu': 0.99}).implementation == 'dense'
    assert backend.fastest({'dense': 1.0, 'cpu': 0.9}).implementation == 'cpu'
    assert backend.fastest({'dense': 1.0}).implementation == 'dense'


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.grad(lambda *a: f(*a).sum())])
def test_products_are_found_inside_transformations_and_where_they_were_traced_before(wrap):
    masks = np.ones((3, 4, 4), bool)
    patterns = kernels.make_patterns({'w': masks, 'out': masks[0]}, stacked=lambda path, leaf: path == 'w')

    def network(x, patterns):
        x = jax.lax.scan(lambda x, pattern: (kernels.sparse_dot(x, jnp.eye(4), pattern), None), x, patterns['w'])[0]
        return kernels.sparse_dot(x, jnp.eye(4), patterns['out'])

    function, x = wrap(network), jnp.ones((2, 4))
    function(x, patterns)
    assert [(call.name, call.x) for call in measure.products_of(function, x, patterns)] == [
        ('w', (2, 1, 1, 4)),
        ('out', (2, 1, 1, 4)),
    ]


@needs_compiler
def test_by_rule_a_sparse_pattern_takes_the_kernel_and_a_dense_one_does_not():
    def calls(density, rows=64):
        mask = np.random.default_rng(0).permutation(10_000).reshape(100, 100) < round(density * 10_000)
        text = str(
            jax.make_jaxpr(lambda x, w: kernels.sparse_dot(x, w, kernels.make_pattern(mask)))(
                jnp.ones((rows, 100)), jnp.ones((100, 100))
            )
        )
        return 'sparse_jax_forward' in text

    assert calls(0.05) and calls(0.2) and not calls(0.5)
    assert calls(0.1, rows=15) and not calls(0.15, rows=15) and calls(0.15, rows=16)


def test_the_rule_goes_by_the_density_now_not_by_the_capacity_that_is_kept():
    full = kernels.make_patterns({'w': np.ones((100, 100), bool)})
    sparse = kernels.make_patterns({'w': np.arange(10_000).reshape(100, 100) < 500}, previous=full)['w']
    assert sparse.capacity == 10_000 and (sparse.density_bound, full['w'].density_bound) == (0.1, 1)


@settings(max_examples=60)
@given(
    st.integers(1, 7), st.integers(1, 40), st.none() | st.integers(0, 9), st.integers(0, 20), st.none() | st.integers(1, 40),
)  # fmt: skip
def test_a_window_holds_the_steps_before_each_update(update_every, total_steps, window, start_step, stop_step):
    timing = dict(update_every=update_every, total_steps=total_steps, start_step=start_step, stop_step=stop_step)
    updates = [t for t in range(1, total_steps + 1) if sj.schedules.is_update(t, **timing)]
    for count in range(total_steps):
        expected = window is None or any(count + 1 <= t < count + 1 + window for t in updates if t < total_steps or stop_step)
        assert sj.needs_dense_gradient(count, **timing, window=window) == expected


def test_a_window_below_zero_is_refused():
    with pytest.raises(ValueError, match='window=-1 and count=0 must be at least 0'):
        sj.needs_dense_gradient(0, update_every=2, total_steps=9, window=-1)
