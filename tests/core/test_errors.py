"""Bad input to the core: one clear ValueError that says what, what was given and what works."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import sparse_jax as sj
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import method_table

pytestmark = pytest.mark.core

GOOD = dict(density=0.5, update_every=10, total_steps=100)
PARAMS = {'w': jnp.ones((4, 4)), 'bias': jnp.ones(4)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(density=0.0), 'density=0.0: must be a number in (0, 1]'),
        (dict(density=1.5), 'density=1.5: must be'),
        (dict(density=float('nan')), 'density=nan: must be'),
        (dict(density='5%'), "density='5%': must be a number"),
        (dict(density=lambda t: 1.1), 'density: the schedule is 1.1 at step 0; it must be in (0, 1]'),
        (dict(density=jnp.float32(0.5)), 'density must be a Python number, but is a jax array'),
        (dict(update_every=0), 'update_every=0: must be an integer, at least 1'),
        (dict(update_every=2.5), 'update_every=2.5: must be an integer'),
        (dict(total_steps=0), 'total_steps=0: must be an integer, at least 1'),
        (dict(start_step=-1), 'start_step=-1: must be'),
        (dict(stop_step=-1), 'stop_step=-1: must be'),
        (dict(prune_rate=1.5), 'prune_rate=1.5: must be in [0, 1]'),
        (dict(seed=0.5), 'seed=0.5: must be an integer, or a typed random key'),
        (dict(distribution='unifrom'), "distribution='unifrom' does not exist. Did you mean 'uniform'?"),
        (dict(granularity='block:4*4'), "granularity='block:4*4': must be 'block:RxC' or 'block:RxC:kernel'"),
        (dict(prune_rate='fast'), "prune_rate='fast': must be in [0, 1]"),
        (dict(sparsifiable=['w']), "sparsifiable=['w']: must be a function"),
        (dict(stacked=True), 'stacked=True: must be a function'),
        (dict(distribution=['erk']), "distribution=['erk'] does not exist"),
        (dict(dense=3), 'dense=3: must be a sequence of path patterns'),
        (dict(update_every=True), 'update_every=True: must be an integer'),
        (dict(track_exploration='no'), "track_exploration='no': must be True or False"),
        (dict(prune=['magnitude']), "prune=['magnitude'] does not exist. Did you mean 'magnitude'"),
        (dict(grow={}), 'grow={} does not exist. Known: gradient'),
        (dict(redistribute=[]), 'redistribute=[] does not exist. Known: mean_gradient'),
        (dict(momentum={}), "momentum={}: must be the name of a field, such as 'trace'"),
        (
            dict(prune=lambda: 1),
            'prune: must be a function (info: sj.criteria.LeafInfo) -> scores, but <lambda> has the signature ()',
        ),
        (dict(grow=lambda a, b: 1), 'grow: must be a function (info: sj.criteria.LeafInfo) -> scores'),
        (dict(momentum=lambda: 1), 'momentum: must be a function (inner_state) -> tree like the params'),
        (
            dict(sparsifiable=lambda path: 1),
            'sparsifiable: must be a function (path, leaf) -> bool, but <lambda> has the signature (path)',
        ),
        (dict(stacked=lambda a, b, c: 1), 'stacked: must be a function (path, leaf) -> bool'),
        (dict(distribution=lambda layers: 1), 'distribution: must be a function (layers, density) -> counts'),
        (dict(prune_rate=lambda: 0.1), 'prune_rate: must be a function (step) -> number'),
        (dict(prune_rate=lambda t: 'x'), "prune_rate: the schedule must return a number, but at step 10 it returned 'x'"),
        (dict(prune_rate=lambda t: t / 50), 'prune_rate: the schedule is 1.8 at step 90; it must be in [0, 1]'),
        (dict(density=lambda a, b: 0.1), 'density: must be a function (step) -> number'),
        (dict(density=lambda t: 'x'), "density: the schedule must return a number, but at step 0 it returned 'x'"),
    ],
)
def test_arguments(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sj.sparsify(optax.sgd(0.1), **{**GOOD, **change})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(grow=lambda info: 'x'), "grow: the criterion must return scores, but for 'w' it returned 'x'"),
        (dict(grow=lambda info: None), "grow: the criterion must return scores, but for 'w' it returned None"),
        (dict(prune=lambda info: 1.0), "prune: the criterion must return scores of the layer's shape (4, 4), but for 'w'"),
        (dict(redistribute=lambda info: None), "redistribute: the criterion must return one number, but for 'w' it returned None"),
        (dict(distribution=lambda layers, density: None), 'distribution returned None for layers of [16] units'),
    ],
)
def test_results_of_functions_given(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tx = sj.sparsify(optax.sgd(0.1), **{**GOOD, **change})
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)


@pytest.mark.parametrize('value', [3, (10, 100), None])
def test_a_rule_or_timing_of_another_type(value):
    if value is not None:
        with pytest.raises(ValueError, match=r'rule=.*: must be a sj.Rule'):
            sj.sparsify(optax.sgd(0.1), rule=value)
        with pytest.raises(ValueError, match=r'timing=.*: must be a sj.Timing'):
            sj.sparsify(optax.sgd(0.1), density=0.5, timing=value)
    with pytest.raises(ValueError, match=r'timing=.*: must be a sj.Timing'):
        sj.Rule(density=0.5, timing=value)


def test_an_inner_that_is_no_optimizer():
    with pytest.raises(ValueError, match=r'inner=0.001: must be an optax transformation'):
        sj.methods.rigl(1e-3, 0.1, 10, 100)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(update_every=0), 'update_every=0: must be an integer, at least 1'),
        (dict(density='0.1'), "density='0.1': must be a number"),
        (dict(density=-0.1), 'density=-0.1: must be a number'),
        (dict(density=lambda t: 0.1), 'granet takes a number'),
        (dict(initial_density=2), 'initial_density=2: must be a number from density=0.5 to 1'),
        (dict(initial_density=0.1), 'initial_density=0.1: must be a number from density=0.5 to 1'),
        (dict(total_steps='x'), "total_steps='x': must be an integer"),
    ],
)
def test_arguments_of_methods(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sj.methods.granet(optax.sgd(0.1), **{**GOOD, **change})


def test_no_sparsifiable_leaf():
    names = re.escape('they are b (float32[3]), i (int32[2, 2]), norm_scale (float32[4, 4]). By default')
    with pytest.raises(ValueError, match=f'no leaf of params is sparsifiable: {names}'):
        sj.sparsify(optax.sgd(0.1), **GOOD).init({'norm_scale': jnp.ones((4, 4)), 'b': jnp.ones(3), 'i': jnp.ones((2, 2), int)})


def test_very_many_updates():
    timing = dict(update_every=2, total_steps=2**31 - 1)
    sj.methods.rigl(optax.sgd(0.1), 0.3, **timing)  # neither listed nor evaluated one by one
    with pytest.raises(ValueError, match='update_every=2 and total_steps=2147483647 make 1,073,741,823 mask updates'):
        sj.sparsify(optax.sgd(0.1), density=sj.schedules.cubic(0.5, 0.1, 1, 100), **timing)


def test_nothing_left_sparse():
    with pytest.raises(ValueError, match=r'dense=\[.\*.\] leaves no leaf of params sparse: they are v .*Name fewer of them.'):
        sj.sparsify(optax.sgd(0.1), **GOOD, dense=['*']).init({'w': jnp.ones((4, 4)), 'v': jnp.ones((4, 4))})


def test_budget_below_one_weight_a_layer():
    with pytest.raises(ValueError, match=r'density=0.01 keeps 1 of 64 units, fewer than the 4 sparse layers.*at least 0.0625'):
        sj.sparsify(optax.sgd(0.1), **{**GOOD, 'density': 0.01}).init([jnp.ones((4, 4))] * 4)


def test_every_layer_gets_a_weight_from_the_largest():
    def uniform(sizes, density):
        return sj.distributions.uniform([sj.distributions.Layer(str(n), (n, 1), n) for n in sizes], density)

    assert uniform([1000, 10, 1], 0.01) == [8, 1, 1]
    assert uniform([1, 1, 1], 1.0) == [1, 1, 1]


@pytest.mark.parametrize('counts', [[4], [0, 8], [4, 17]])
def test_a_distribution_of_ones_own_is_checked(counts):
    with pytest.raises(ValueError, match='distribution returned'):
        sj.sparsify(optax.sgd(0.1), distribution=lambda layers, density: counts, **GOOD).init([jnp.ones((4, 4))] * 2)


def test_missing_and_foreign_params():
    tx = sj.sparsify(optax.sgd(0.1), **GOOD)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r'tx.update\(grads, state, params\)'):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match='but init was given'):
        tx.update({'w': PARAMS['w']}, state, {'w': PARAMS['w']})
    with pytest.raises(ValueError, match=r'w has the shape \(4, 5\), but at init it had \(4, 4\)'):
        tx.update({**PARAMS, 'w': jnp.ones((4, 5))}, state, {**PARAMS, 'w': jnp.ones((4, 5))})


def test_scalar_and_empty_sparse_leaves():
    for shape in ((), (0, 3)):
        with pytest.raises(ValueError, match="sparsifiable chose the leaf 'x'"):
            sj.sparsify(optax.sgd(0.1), sparsifiable=lambda path, leaf: True, **GOOD).init({'x': jnp.ones(shape)})


def test_masks_of_other_states_trees_shapes_and_dtypes():
    state = sj.sparsify(optax.sgd(0.1), **GOOD).init(PARAMS)
    with pytest.raises(ValueError, match='holds 0 SparsifyStates'):
        sj.get_masks(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match='holds 2 SparsifyStates'):
        sj.get_masks((state, state))
    with pytest.raises(ValueError, match='masks are another tree: no mask for bias'):
        sj.set_masks(state, {'w': jnp.ones((4, 4), bool)})
    with pytest.raises(ValueError, match=re.escape('masks: w is float32[4, 4], but must be bool[4, 4]')):
        sj.set_masks(state, {'w': jnp.ones((4, 4)), 'bias': jnp.array(True)})


def test_a_leaf_too_large():
    with pytest.raises(ValueError, match=r'2147483648 elements; a sparse leaf takes fewer than 2\^31'):
        jax.eval_shape(sj.sparsify(optax.sgd(0.1), **GOOD).init, {'w': jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)})


def test_default_sparsifiable_is_by_path_axes_and_dtype():
    params = {
        'embed': jnp.ones((4, 4)), 'block': {'LayerNorm_0': {'kernel': jnp.ones((4, 4))}, 'dense': {'kernel': jnp.ones((4, 4))}},
        'conv1x1': jnp.ones((1, 1)), 'steps': jnp.ones((3, 3), int), 'vector': jnp.ones(8),
    }  # fmt: skip
    masks = sj.get_masks(sj.sparsify(optax.sgd(0.1), **GOOD).init(params))
    assert sj.layer_names(masks) == ['block/dense/kernel', 'conv1x1']


@pytest.mark.parametrize(
    ('path', 'sparse'),
    [
        ('normal_proj/kernel', True), ('rescale_head/kernel', True), ('normalizer/w', True), ('unbiased/kernel', True),
        ('position_encoder/kernel', True), ('tokenizer/kernel', True), ('token_mixer', True), ('posterior', True),
        ('LayerNorm_0/kernel', False), ('layernorm/w', False), ('BatchNorm2D/kernel', False), ('RMSNorm/scale', False),
        ('embedding', False), ('Embed_0/embedding', False), ('encoder/embeddings/table', False), ('attention/bias', False),
        ('pos', False), ('posEmb', False), ('pos_embedding', False), ('cls_token', False), ('mask_token', False), ('position', False),
        ('encoder.norm.weight', False), ('preNorm/kernel', False),
    ],
)  # fmt: skip
def test_words_of_a_path_decide(path, sparse):
    assert layers_lib.default_sparsifiable(path, jnp.ones((4, 4))) == sparse


def test_patterns_match_the_names_that_tables_show():
    class Network(nnx.Module):
        def __init__(self):
            self.hidden, self.out = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))

    model = Network()
    tx = sj.sparsify(optax.sgd(0.1), dense=('out/kernel',), **GOOD)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert sj.layer_names(optimizer.opt_state) == ['hidden/kernel'] and 'hidden/kernel' in sj.stats.table(optimizer.opt_state)
    # no nnx.as_pure: variables of either kind, by their paths
    masks, params = sj.get_masks(optimizer.opt_state), nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match='8 weights off the mask are not zero: hidden/kernel'):
        sj.check_sparse(params, optimizer.opt_state)
    nnx.update(model, sj.apply_masks(params, masks))
    sj.check_sparse(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert (model.hidden.kernel[...] != 0).sum() == 8
    moved = sj.set_masks(optimizer.opt_state, jax.tree.map(jnp.ones_like, nnx.as_pure(masks)))
    assert sj.stats.density(moved) == 1


def test_stacked_may_ask_for_the_dtype():
    stacked = lambda path, leaf: leaf.ndim == 3 and jnp.issubdtype(leaf.dtype, jnp.floating)
    tx = sj.sparsify(optax.sgd(0.1), stacked=stacked, **GOOD)
    params = {'blocks': jnp.ones((2, 4, 4)), 'head': jnp.ones((4, 2))}
    _, state = tx.update(params, tx.init(params), params)
    assert state.stats.share.shape == (3,)


def test_layer_names_of_stacked_leaves():
    stacked = lambda path, leaf: 'blocks' in path
    state = sj.sparsify(optax.sgd(0.1), stacked=stacked, **GOOD).init({'blocks': jnp.ones((2, 4, 4)), 'head': jnp.ones((4, 2))})
    assert sj.layer_names(state.masks, stacked) == ['blocks[0]', 'blocks[1]', 'head']
    assert state.masks['blocks'].sum(axis=(1, 2)).tolist() == [8, 8]
    assert state.stats.share.shape == (3,)


@pytest.mark.parametrize('name', method_table.NAMES)
def test_params_without_leaves_are_told_by_the_first_update(name):
    tx = sj.methods.create(name, optax.sgd(0.1, momentum=0.9), density=0.5, update_every=2, total_steps=8)
    state = tx.init({})
    with pytest.raises(ValueError, match='no leaf of params is sparse'):
        tx.update({}, state, {})
