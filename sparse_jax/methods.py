"""Published methods, each as one thin call of :func:`sparse_jax.sparsify`."""

import jax
import optax

from sparse_jax import distributions, transform
from sparse_jax import granularity as granularity_lib
from sparse_jax.masks import PathPredicate


def sparse_momentum(
    learning_rate: optax.ScalarOrSchedule,
    density: float,
    update_every: int,
    total_steps: int,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    prune_rate: optax.ScalarOrSchedule = 0.5,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Unstructured = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    stacked: PathPredicate | None = None,
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
      stacked: which leaves hold layers along their first axis.
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
    inner = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))
    return transform.sparsify(
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
        stacked=stacked,
        seed=seed,
    )
