"""Published methods: each one row of parts for :func:`sparse_jax.sparsify`, and a thin function that calls it with them.

ITOP (In-Time Over-Parameterization, Liu et al., https://arxiv.org/abs/2102.02887) needs no method: it is any of them with an
``update_every`` long enough to train what was grown, and as many updates as it takes for the exploration rate
(``sj.stats.exploration_rate``, with ``track_exploration=True``) to come near 1.

An inner optimizer's momentum is not touched by any of them: a new weight starts at 0, with the momentum that its gradients left while
it was missing, and moves with the next step. RigL's and SET's own programs start it without.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import criteria, distributions
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import sparsify as sparsify_lib
from sparse_jax.core.layers import PathPredicate
from sparse_jax.core.matrix_axes import MatrixAxes
from sparse_jax.core.method_table import NAMES as NAMES
from sparse_jax.core.method_table import create as create
from sparse_jax.core.method_table import parts as parts
from sparse_jax.core.method_table import rule as rule


def sparse_momentum(
    learning_rate: optax.ScalarOrSchedule,
    density: optax.ScalarOrSchedule,
    update_every: int,
    total_steps: int,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    prune_rate: optax.ScalarOrSchedule = 0.5,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | Mapping[str, float] | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Granularity = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
    stacked: PathPredicate | None = None,
    matrix_axes: str | MatrixAxes | None = None,
    track_exploration: bool = False,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse momentum: SGD with momentum, weights pruned by magnitude, grown and redistributed by momentum.

    It is ``sparsify(chain(add_decayed_weights(weight_decay), sgd(learning_rate, momentum, nesterov)), ...)``: with L2 coupled into
    the gradient, as in the paper's code. Every layer prunes the same rate of its weights; what was pruned goes to the layers in
    proportion to the mean \|momentum\| of their weights; and there it grows where the momentum of missing weights is largest.

    Args:
      learning_rate: a number, or an optax schedule of the step.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is one epoch.
      total_steps: length of the training, in steps.
      momentum: decay of the momentum, in [0, 1).
      nesterov: whether to use Nesterov momentum.
      weight_decay: L2 coefficient, added to the gradient as ``weight_decay * params``.
      prune_rate: start of a cosine that ends at 0.005, or a schedule of the step.
      start_step: no mask update up to this step.
      stop_step: no mask update from this step on; None: ``total_steps``.
      distribution: initial nonzeros of each layer; see :func:`sparse_jax.sparsify`, as for the arguments below.
      granularity: what one unit of selection is.
      sparsifiable: which leaves are sparse.
      dense: path patterns of leaves that stay dense.
      stacked: which leaves hold layers along their first axis.
      matrix_axes: which axes of a leaf are inputs and outputs.
      track_exploration: whether to keep which weights have ever been active.
      seed: of the first masks: an integer, or a typed random key.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> import jax, jax.numpy as jnp, sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.05, update_every=100, total_steps=1000)
      >>> state = tx.init({'kernel': jnp.ones((20, 10))})
      >>> int(sj.get_masks(state)['kernel'].sum())
      10

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing Performance
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    if isinstance(momentum, str) or (isinstance(momentum, int | float) and not 0 <= momentum < 1):
        raise ValueError(f'momentum={momentum!r}: must be a number in [0, 1), the decay of the momentum.')
    inner = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))
    return sparsify_lib.sparsify(
        inner,
        density=density,
        update_every=update_every,
        total_steps=total_steps,
        prune_rate=prune_rate,
        start_step=start_step,
        stop_step=stop_step,
        distribution=distribution,
        granularity=granularity,
        sparsifiable=sparsifiable,
        dense=dense,
        stacked=stacked,
        matrix_axes=matrix_axes,
        track_exploration=track_exploration,
        seed=seed,
    )


def set_(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """SET: the smallest positive and the largest negative weights go, and as many grow at random in the same layer.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is one epoch.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.3 throughout, an
        Erdős-Rényi distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = set_(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
      <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    return create('set', inner, density, update_every, total_steps, **options)


def rigl(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    accumulate_steps: int = 1,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""RigL: the smallest weights go, and as many grow in the same layer where the \|gradient\| of missing weights is largest.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is 100.
      total_steps: length of the training, in steps.
      accumulate_steps: grow by the sum of the gradients of so many steps, for small batches; 1: the update's own step alone.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate that falls from 0.3 by a cosine to
        0 at three quarters of the training, where updates stop; an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = rigl(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000, accumulate_steps=10)

    Reference:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    if accumulate_steps != 1:
        options = {'grow': criteria.accumulated_gradient(accumulate_steps), **options}
    return create('rigl', inner, density, update_every, total_steps, **options)


def snfs(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    redistribute: str | criteria.Criterion | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SNFS as RigL's paper compares against: sparse momentum on an average of the gradients of its own, without redistribution.

    Args:
      inner: any optax transformation; its momentum is not used.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      redistribute: ``'mean_momentum'`` for the original's redistribution; None: each layer regrows what it pruned.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.5 that falls by a cosine, an
        ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = snfs(optax.sgd(0.1), 0.05, update_every=100, total_steps=1000, redistribute='mean_momentum')

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019, in the form of Evci et
      al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    return create('snfs', inner, density, update_every, total_steps, redistribute=redistribute, **options)


def dsr(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """DSR: one threshold prunes over all layers, and what went grows at random, shared out by the weights that layers have left.

    The published threshold is adapted from update to update so that about the wanted number goes; here it is found exactly.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.2 throughout, a uniform
        distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = dsr(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.
    """
    return create('dsr', inner, density, update_every, total_steps, **options)


def static(
    inner: optax.GradientTransformation, density: float, update_every: int = 1, total_steps: int = 1, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Static sparse training: the first mask, drawn at random, stays.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: not used: there are no updates.
      total_steps: not used.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`; ``set_masks`` gives it a mask of one's own.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = static(optax.sgd(0.1, 0.9), 0.05)

    Reference:
      As the baseline ``Static`` of Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    return create('static', inner, density, update_every, total_steps, **options)


def gmp(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning: dense at first, and the smallest weights go for good as a cubic schedule of the density asks.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist after the last update, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a density from 1 after ``start_step`` to the given
        one at the last update (before ``stop_step``, where that is given), a uniform distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = gmp(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000, stop_step=800)

    Reference:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    return create('gmp', inner, density, update_every, total_steps, **options)


def granet(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    initial_density: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GraNet: gradual pruning by one threshold over all layers, and at each update some weights move as in RigL.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist after the last update, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      initial_density: where the density begins, from ``density`` to 1; None: 0.5 (or ``density``, if that is more), as the
        paper's sparse-to-sparse runs; its dense ones begin at 1.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a cubic schedule of the density, a prune rate of
        0.5 that falls by a cosine and moves weights within each layer, growth by \|gradient\|, an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = granet(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Liu et al., `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration <https://arxiv.org/abs/2106.10404>`_, 2021.
    """
    if initial_density is not None:
        options['initial_density'] = initial_density
    return create('granet', inner, density, update_every, total_steps, **options)


def srigl(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    ablation: float = 0.3,
    keep_outputs: Sequence[str] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SRigL: RigL with the same number of inputs for every output of a layer, where outputs that matter little lose all of theirs.

    Salient are the weights that the pruning leaves, and as many positions as were pruned, those with the largest \|gradient\| of the whole
    layer. An output with fewer salient ones than ``max(1, int(ablation * inputs))`` is ablated, as far as the layer's weights still fit into the
    others, which share them equally. Outputs are judged anew at each update, so they can return.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is 100.
      total_steps: length of the training, in steps.
      ablation: part of a layer's inputs that must be salient, in [0, 1]; 0: outputs stay.
      keep_outputs: path patterns of leaves that lose no outputs; None: the last layer. Name the output layer where it is another.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: RigL's, and ``granularity='fan_in'``.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = srigl(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000, keep_outputs=('out/*',))

    Reference:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity <https://arxiv.org/abs/2305.02299>`_, 2024.
    """
    return create('srigl', inner, density, update_every, total_steps, ablation=ablation, keep_outputs=keep_outputs, **options)


def top_kast(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    backward_density: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Top-KAST: the largest weights of each layer are used, and a wider set of the largest is trained.

    Params hold the weights of the forward pass, zero elsewhere. The values of all others are in ``method_state['stored']``, and which weights
    are trained in ``method_state['backward']``: gradients, which must be dense at every step, are masked by it, and so are the inner
    optimizer's updates. Both sets are chosen anew by \|weight\| every ``update_every`` steps. ``init`` takes dense params; the paper's penalty
    on weights outside of the forward pass is not in it, weight decay of the inner optimizer acts on all that are trained.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that the forward pass uses, in (0, 1].
      update_every: steps between choices; the paper's are from 1 to 100.
      total_steps: length of the training, in steps.
      backward_density: share of the weights that are trained, from ``density`` to 1; None: twice the density.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = top_kast(optax.sgd(0.1, 0.9), 0.1, update_every=10, total_steps=1000, backward_density=0.3)

    Reference:
      Jayakumar et al., `Top-KAST: Top-K Always Sparse Training <https://arxiv.org/abs/2106.03517>`_, 2020.
    """
    if backward_density is not None:
        options['backward_density'] = backward_density
    return create('top_kast', inner, density, update_every, total_steps, **options)


def mest(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, *, extra: float = 0.3, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""MEST: weights grow at random first and are pruned at the next update, by \|weight\| + 0.5 \|gradient\|, new ones among the rest.

    Between updates there are :math:`(1 + e) d` of the weights, the paper's soft memory bound; e falls from ``extra`` by a cosine to 0 at the
    last update, after which the density is d.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist in the end, d in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      extra: e at the start, above 0.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: among them an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = mest(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Yuan et al., `MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge <https://arxiv.org/abs/2110.14032>`_, 2021.
    """
    return create('mest', inner, density, update_every, total_steps, extra=extra, **options)


def ac_dc(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """AC/DC: dense at first, then sparse and dense phases by turns, the last one sparse; a sparse phase keeps the largest weights.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist in the sparse phases, in (0, 1].
      update_every: length of a phase in steps; the paper's is 5 epochs. The last sparse phase takes what is left.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`, and where the training has no second phase.

    Example:
      >>> tx = ac_dc(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Peste et al., `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks <https://arxiv.org/abs/2106.12379>`_, 2021.
    """
    return create('ac_dc', inner, density, update_every, total_steps, **options)


def truncation(
    inner: optax.GradientTransformation,
    density: float,
    total_steps: int,
    *,
    anneal: float = 0.5,
    biases: bool = False,
    embeddings: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Truncation: after each step every matrix keeps its largest weights, and the density falls evenly from 1.

    A missing weight comes back with the value that the optimizer's step gives it, where that is among the largest of its leaf.

    Args:
      inner: any optax transformation; the paper's is AdamW.
      density: share of the sparse leaves' weights that exist in the end, in (0, 1]; the paper's are about 0.001.
      total_steps: length of the training, in steps.
      anneal: part of the training over which the density falls, in (0, 1].
      biases: whether biases and scales, leaves of one axis, are truncated too.
      embeddings: whether embeddings are, and whatever else of two or more axes is dense by its name.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's, such as ``update_every``, which is 1.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = truncation(optax.adamw(1e-3), 0.01, total_steps=1000, embeddings=True)

    Reference:
      Gao et al., `Weight-sparse transformers have interpretable circuits <https://arxiv.org/abs/2511.13653>`_, 2025.
    """
    if biases or embeddings:
        if 'sparsifiable' in options:
            raise ValueError('sparsifiable= says which leaves are truncated: leave out biases= and embeddings=.')
        options['sparsifiable'] = functools.partial(_truncated, biases, embeddings)
    return create('truncation', inner, density, options.pop('update_every', 1), total_steps, anneal=anneal, **options)


def _truncated(biases: bool, embeddings: bool, path: str, leaf: Any) -> bool:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or not np.ndim(leaf):
        return False
    return biases if np.ndim(leaf) == 1 else embeddings or layers_lib.default_sparsifiable(path, leaf)
