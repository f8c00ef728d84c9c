"""Which backend runs a product: every refusal has its reason, and nothing runs elsewhere without a word."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax import kernels
from sparse_jax.core import errors
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.kernels import backend, measure, store
from sparse_jax.kernels.reference import Geometry

pytestmark = pytest.mark.core


def _operands(block=(64, 64), dtype=jnp.bfloat16, size=128, **options):
    mask = np.kron(np.eye(size // block[0], dtype=bool), np.ones(block, bool))
    w = jnp.asarray(mask, dtype)
    return jnp.ones((64, size), dtype), w, kernels.make_pattern(mask, block=block, **options)


@pytest.mark.parametrize(
    'platform, capability, block, dtype, implementation, reason',
    [
        ('cpu', '', (64, 64), 'bfloat16', 'gpu', 'it runs on an NVIDIA GPU, not on cpu'),
        ('cpu', '', (128, 128), 'bfloat16', 'tpu', 'it runs on a TPU, not on cpu'),
        ('gpu', '9.0', (128, 128), 'bfloat16', 'tpu', 'it runs on a TPU, not on gpu'),
        ('gpu', '9.0', (64, 64), 'float32', 'cpu', 'it runs on CPU, not on gpu'),
        ('gpu', '8.0', (64, 64), 'bfloat16', 'gpu', r'needs a Hopper GPU \(compute capability 9.0.*this one has 8.0'),
        ('gpu', '10.0', (64, 64), 'bfloat16', 'gpu', 'needs a Hopper GPU .* this one has 10.0'),
        ('gpu', 'gfx942', (64, 64), 'bfloat16', 'gpu', 'needs a Hopper GPU .* this one has gfx942'),
        ('gpu', '9.0', (64, 64), 'float32', 'gpu', 'bfloat16 and float16, got float32: set config.model.dtype=bfloat16'),
        ('gpu', '9.0', (16, 16), 'bfloat16', 'gpu', 'sides of 32, 64, 128, got blocks of 16x16: .*block:64x64'),
        ('gpu', '9.0', (1, 1), 'bfloat16', 'gpu', 'got single weights: train with sparsity.granularity=block:64x64'),
        ('tpu', '', (64, 64), 'bfloat16', 'tpu', 'blocks of 128x128, as the compiler wants .* got blocks of 64x64'),
        ('tpu', '', (128, 128), 'float16', 'tpu', 'bfloat16 and float32, got float16'),
    ],
)
def test_a_named_implementation_is_refused_with_the_reason(platform, capability, block, dtype, implementation, reason):
    x, w, pattern = _operands(block, jnp.dtype(dtype))
    with kernels.lowering_for(platform, capability=capability), pytest.raises(NotImplementedError, match=reason):
        kernels.sparse_dot(x, w, pattern, implementation=implementation)


def test_float64_is_refused():
    with jax.enable_x64(True):
        x, w, pattern = _operands(dtype=jnp.float64)
        with kernels.lowering_for('gpu'), pytest.raises(NotImplementedError, match='got float64'):
            kernels.sparse_dot(x, w, pattern, implementation='gpu')


def test_a_pattern_of_another_block_size_and_one_too_small_are_refused():
    x, w, pattern = _operands(size=128)
    with pytest.raises(ValueError, match='does not consist of whole blocks of 128x128'):
        kernels.make_pattern(np.asarray(w, bool), block=(128, 128))
    with pytest.raises(ValueError, match=r'w has shape \(128, 128\), its pattern is of shape \(64, 64\)'):
        kernels.sparse_dot(x, w, kernels.make_pattern(np.ones((64, 64), bool), block=(64, 64)))
    short = pattern.__class__(pattern.indices[:1], *jax.tree.leaves(pattern)[1:], pattern.shape, pattern.granularity)
    with pytest.raises(ValueError, match='lists 2 units and has room for 1.*make_pattern'):
        kernels.sparse_dot(x, w, short)


def test_unknown_names_are_told():
    x, w, pattern = _operands()
    with pytest.raises(ValueError, match="implementation='gpus' does not exist. Did you mean 'gpu'"):
        kernels.sparse_dot(x, w, pattern, implementation='gpus')
    with pytest.raises(ValueError, match="platform='cuda' does not exist.*cpu, gpu, tpu"), kernels.lowering_for('cuda'):
        pass


def _fresh():
    errors.say_once.cache_clear()


def _by_rule(density, granularity, units=4096):
    """The backend of a pattern of that density, for which nobody names one."""
    rows, columns = granularity.sides
    mask = np.repeat(np.repeat(np.arange(units)[None] < round(density * units), rows, 0), columns, 1)
    return backend._by_rule(kernels.make_pattern(mask, granularity=granularity), 64).implementation


def test_a_pattern_that_names_what_does_not_run_takes_the_reference_and_says_so_once(caplog):
    _fresh()
    x, w, pattern = _operands(implementation='gpu', name='fc1')
    with caplog.at_level(logging.WARNING, 'sparse_jax'):
        for _ in range(3):
            got = kernels.sparse_dot(x, w, pattern)
    np.testing.assert_array_equal(got, x @ w)
    assert [r.getMessage() for r in caplog.records] == [
        "sparse_jax: the reference multiplies fc1 instead of 'gpu': it runs on an NVIDIA GPU, not on cpu."
    ]


def test_none_takes_a_gpus_kernels_up_to_the_density_that_was_measured(tmp_path, monkeypatch, caplog):
    """The table is a file of this user's, by kind of device; this machine's device stands in for a GPU's name."""
    _fresh()
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    monkeypatch.setattr(backend.target, 'platform', lambda: 'gpu')
    monkeypatch.setattr(backend.device, 'capability', lambda: '9.0')
    with caplog.at_level(logging.WARNING, 'sparse_jax'):
        assert _by_rule(0.1, Block(64, 64), 10) == 'reference'
        assert _by_rule(0.1, Block(64, 64), 10) == 'reference'
    assert len(caplog.records) == 1 and 'blocks of 64x64 were not measured on cpu' in caplog.text
    store.write_crossover('cpu', Block(64, 64), 1 - 0.9)
    densities = 0.05, 0.1, 410 / 4096, 0.11  # a tenth, as floats and whole blocks have it
    bounds = [backend.density_bound(density, Block(64, 64)) for density in densities]
    assert bounds == [0.05, 0.1, 0.1, 0.2]
    assert [_by_rule(density, Block(64, 64), 100) for density in densities] == ['gpu', 'gpu', 'gpu', 'reference']
    assert _by_rule(0.01, Unstructured()) == 'reference'  # single weights: masked dense products, always


def test_none_says_why_where_a_gpus_kernels_cannot_run_and_what_would_measure(tmp_path, monkeypatch, caplog):
    _fresh()
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    monkeypatch.setattr(backend.target, 'platform', lambda: 'gpu')
    monkeypatch.setattr(backend.device, 'capability', lambda: '8.0')
    x, w, pattern = _operands()
    with caplog.at_level(logging.WARNING, 'sparse_jax'):
        np.testing.assert_array_equal(kernels.sparse_dot(x, w, pattern), x @ w)
        assert "the reference multiplies instead of 'gpu': it needs a Hopper GPU" in caplog.text and 'benchmarks' not in caplog.text
        caplog.clear()
        monkeypatch.setattr(backend.target, 'platform', lambda: 'tpu')
        assert _by_rule(0.1, Block(128, 128), 10) == 'reference'  # nothing measures TPUs
        assert 'not measured on cpu' in caplog.text and 'benchmarks' not in caplog.text
        assert _by_rule(0.1, Block(64, 64), 10) == 'tpu'  # and who takes that is told why not


@pytest.mark.parametrize('platform', ('gpu', 'tpu'))
def test_where_jax_counts_in_64_bits_the_kernels_lower_all_the_same(platform):
    with jax.enable_x64(True):
        x, w, pattern = _operands((128, 128), size=256)
        with kernels.lowering_for(platform):
            loss = lambda w: kernels.sparse_dot(x, w, pattern, implementation=platform).astype(jnp.float32).sum()
            lowered = jax.jit(jax.grad(loss)).trace(w).lower(lowering_platforms=({'gpu': 'cuda'}.get(platform, platform),))
        assert 'sparse_jax_weight_gradient' in lowered.as_text()
        scores = functools.partial(kernels.block_scores, w_shape=w.shape, block=(128, 128), implementation=platform)
        with kernels.lowering_for(platform):
            assert jax.eval_shape(scores, x, x).shape == (2, 2)


@pytest.mark.parametrize('platform', ('gpu', 'tpu'))
def test_convolutions_with_an_empty_result_are_zeros(platform):
    mask = np.ones((3, 3, 128, 128), bool)
    x, w, pattern = (
        jnp.ones((4, 2, 2, 128), jnp.bfloat16),
        jnp.ones(mask.shape, jnp.bfloat16),
        kernels.make_pattern(mask, block=(128, 128)),
    )
    with kernels.lowering_for(platform):
        y, back = jax.vjp(lambda *a: kernels.sparse_conv(*a, pattern, padding='VALID', implementation=platform), x, w)
        assert y.shape == (4, 0, 0, 128)
        assert [not np.asarray(d).any() and d.shape == of.shape for d, of in zip(back(y), (x, w), strict=True)] == [True, True]
        scores = kernels.block_scores(x, y, mask.shape, block=[128, 128], padding='VALID', implementation=platform)
        assert scores.shape == (3, 3, 1, 1) and not np.asarray(scores).any()


def test_the_launchers_candidates_are_those_of_the_platform():
    call = measure.Call('fc', (64, 1, 1, 128), (1, 1, 128, 128), Geometry(), Block(64, 64), 'bfloat16')
    with kernels.lowering_for('gpu'):
        assert measure.candidates(call) == ('dense', 'gpu')
        assert measure.candidates(call._replace(granularity=Block(8, 8))) == ('dense',)
        assert measure.candidates(call._replace(dtype='float32')) == ('dense',)
    with kernels.lowering_for('tpu'):
        assert measure.candidates(call._replace(granularity=Block(128, 128))) == ('dense', 'tpu')
    assert measure.candidates(call) == ('dense',)


def test_block_scores_of_the_reference_and_its_refusals():
    random = np.random.default_rng(0)
    x, dy = random.standard_normal((2, 3, 5)).astype(np.float32), random.standard_normal((2, 3, 7)).astype(np.float32)
    dense = np.abs(np.tensordot(x, dy, ((0, 1), (0, 1))))
    want = [[dense[i : i + 2, o : o + 4].sum() for o in (0, 4)] for i in (0, 2, 4)]
    np.testing.assert_allclose(kernels.block_scores(x, dy, (5, 7), block=(2, 4)), want, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="implementation='gpu' does not run here: it runs on an NVIDIA GPU"):
        kernels.block_scores(x, dy, (5, 7), block=(64, 64), implementation='gpu')
    for given in ((x, dy, (5, 8)), (x.astype(int), dy.astype(int), (5, 7)), (np.float32(1), dy, (5, 7))):
        with pytest.raises(ValueError, match='do not fit'):
            kernels.block_scores(*given, block=(2, 4))
    for block in ((0, 4), 4, (2, 2.5), (2, 2, 2)):
        with pytest.raises(ValueError, match='must be two integers of at least 1'):
            kernels.block_scores(x, dy, (5, 7), block=block)


@pytest.mark.parametrize('platform', ('cpu', 'gpu'))
def test_a_density_bound_stays_until_the_rule_would_answer_otherwise(platform, monkeypatch):
    """It is static: another one compiles the step anew."""
    monkeypatch.setattr(backend.target, 'platform', lambda: platform)
    bounds, before = [], 0.0
    for density in (0.19, 0.21, 0.9, 0.4, 0.19, 0.1, 0.11, 0.09, 0.1, 0.03):
        before = backend.density_bound(density, Block(64, 64), before=before)
        assert before >= density
        bounds.append(before)
    expected = {'cpu': [0.2, 1, 1, 1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], 'gpu': [0.2, 0.5, 1, 1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.05]}
    assert bounds == expected[platform]


def test_a_choice_says_why():
    x, _, pattern = _operands(dtype=jnp.float32)
    choose = functools.partial(backend.choose, dtype=x.dtype, pattern=pattern, rows=64)
    assert choose('reference', empty=False) == ('reference', 'it is named')
    assert choose(None, empty=True) == ('reference', 'there is nothing to multiply')
    assert choose(None, empty=False) == ('reference', 'more than 20% of the weights exist')
    assert backend.of_platform('bfloat16', Unstructured()) == (
        'dense',
        'it computes in float32, got x of bfloat16 and w of bfloat16',
    )
    assert backend.fastest({'dense': 1.0, 'cpu': 0.5}).reason == 'dense 1000.00 ms, cpu 500.00 ms'


def test_granularity_is_given_in_one_way():
    mask = np.ones((4, 4), bool)
    for given in (dict(granularity='block:2x2'), dict(granularity=Block(2, 2)), dict(block=(2, 2)), dict(block=[2, 2])):
        assert kernels.make_pattern(mask, **given).granularity == Block(2, 2)
        assert kernels.make_patterns({'w': mask}, **given)['w'].granularity == Block(2, 2)
    assert kernels.make_pattern(mask, block=(1, 1)).granularity == kernels.make_pattern(mask).granularity == Unstructured()
    assert kernels.make_pattern(mask, granularity='block:2x2:kernel').units == (2, 2)
    for function, masks in ((kernels.make_pattern, mask), (kernels.make_patterns, {'w': mask})):
        with pytest.raises(ValueError, match=f"{function.__name__}: got both granularity='unstructured' and block="):
            function(masks, granularity='unstructured', block=(2, 2))
        with pytest.raises(ValueError, match='must be two integers of at least 1'):
            function(masks, block=(2, 0))
