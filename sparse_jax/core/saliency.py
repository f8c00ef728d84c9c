"""Scores of weights before training, for :func:`sparse_jax.prune`: SNIP and GraSP from a batch, SynFlow from none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[..., jax.Array]  # (params, *args) -> mean loss of a batch


def snip(loss: Loss, params: Any, *args: Any) -> Any:
    r"""SNIP: :math:`|w \, \partial L / \partial w|`, how much the loss of a batch changes if a weight is taken away.

    Args:
      loss: function (params, *args) -> scalar.
      params: pytree of floating-point arrays.
      *args: a batch.

    Returns:
      Scores, a tree like params.

    Raises:
      TypeError: by ``jax.grad``, if the loss is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> snip(lambda p, x: jnp.sum(p['w'] * x), {'w': jnp.array([2.0, -3.0])}, jnp.array([1.0, 5.0]))['w'].tolist()
      [2.0, 15.0]

    Reference: Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity <https://arxiv.org/abs/1810.02340>`_, 2019.
    """
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params, *args))


def grasp(
    apply: Callable[[Any, Any], jax.Array], params: Any, inputs: Any, labels: jax.Array, *, temperature: float = 200.0
) -> Any:
    r"""GraSP: :math:`w \, (H g)`, by how much the squared norm of the gradient falls, to first order, if a weight is taken away.

    Taking w away changes :math:`\|g\|^2` by :math:`-2 w (Hg)`. GraSP keeps the weights whose removal would make the gradient smallest, so that
    the largest scores stay; a score may be negative.

    Args:
      apply: function (params, inputs) -> logits.
      params: pytree of floating-point arrays.
      inputs: of a batch; ten examples of each class in the paper.
      labels: int32, of the logits' shape but for the last axis.
      temperature: that logits are divided by.

    Returns:
      Signed scores, a tree like params.

    Raises:
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = grasp(lambda p, x: x @ p['w'], {'w': jnp.eye(2)}, jnp.ones((1, 2)), jnp.array([0]))
      >>> scores['w'].shape
      (2, 2)

    Reference: Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient Flow <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    if not temperature > 0:
        raise ValueError(f'temperature={temperature!r}: must be positive.')

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs) / temperature, labels).mean()

    gradient = jax.grad(loss)
    _, product = jax.jvp(gradient, (params,), (gradient(params),))
    return jax.tree.map(jnp.multiply, params, product)


def synflow(apply: Callable[[Any, jax.Array], jax.Array], params: Any, example: jax.ShapeDtypeStruct | jax.Array) -> Any:
    r"""SynFlow: :math:`|w| \, \partial R / \partial |w|` with R the sum of the outputs of the network of magnitudes, for an input of ones.

    It needs no data. The paper prunes in a hundred rounds: ``sj.prune(params, d, scores=lambda p: synflow(apply, p, x), rounds=100,
    prune_scope='global')``.

    Args:
      apply: function (params, inputs) -> outputs; without what depends on a batch, such as its normalisation.
      params: pytree of floating-point arrays.
      example: an input, of which only shape and type are taken.

    Returns:
      Scores, a tree like params.

    Raises:
      TypeError: by ``apply``, for an example that it does not take.

    Example:
      >>> import jax.numpy as jnp
      >>> synflow(lambda p, x: x @ p['w'], {'w': jnp.array([[1.0], [-2.0]])}, jnp.zeros((1, 2)))['w'].tolist()
      [[1.0], [2.0]]

    Reference: Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
    <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    ones = jnp.ones(example.shape, example.dtype)
    magnitudes = jax.tree.map(jnp.abs, params)
    gradient = jax.grad(lambda p: jnp.sum(apply(p, ones).astype(jnp.float32)))(magnitudes)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), magnitudes, gradient)
