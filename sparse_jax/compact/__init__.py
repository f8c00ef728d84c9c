"""Training with memory that falls with the density: of a sparse leaf there are its existing units only.

``compress`` takes params and masks to **values**, an ordinary tree of arrays that any optimizer trains which works element by element, and a
**layout** that says where each of them belongs. ``sj.kernels.sparse_dot(x, values, layout)`` multiplies with them. Gradients, moments and
averages are then of existing units only. Which missing units would help comes out of ``jax.grad`` as the gradient of a probe, and a mask
update is three calls: ``plan``, ``fits`` and ``move``.

Example:
  >>> import jax, jax.numpy as jnp, optax, sparse_jax as sj
  >>> rule = sj.methods.rule('rigl', density=0.25, update_every=2, total_steps=8)
  >>> values, layout = sj.compact.init(lambda: {'w': jax.random.normal(jax.random.key(0), (8, 8)), 'bias': jnp.zeros(8)}, rule)
  >>> tx = sj.compact.check(optax.adam(1e-2), values, layout)
  >>> x = jax.random.normal(jax.random.key(1), (16, 8))
  >>> def loss(values, probes, layout):
  ...     y = sj.kernels.sparse_dot(x, values['w'], layout['w'], probe=probes['w']) + values['bias']
  ...     return jnp.mean((y - x) ** 2)
  >>> opt_state, key = tx.init(values), jax.random.key(2)
  >>> for t in range(1, 9):
  ...     is_update = rule.timing.is_update(t)
  ...     probes = sj.compact.probes(layout) if is_update else {'w': None}
  ...     grads, scores = jax.grad(loss, (0, 1))(values, probes, layout)
  ...     updates, opt_state = tx.update(grads, opt_state, values)
  ...     values = optax.apply_updates(values, updates)
  ...     if is_update:
  ...         plan = sj.compact.plan(values, layout, scores, t, key, rule)
  ...         assert sj.compact.fits(plan, layout)
  ...         values, opt_state = sj.compact.move((values, opt_state), plan)
  ...         layout = plan.layout
  >>> int((sj.compact.expand(values, layout)['w'] != 0).sum())
  16
"""

from sparse_jax.compact.convert import compress, expand, init, masks
from sparse_jax.compact.move import fits, move, reserve
from sparse_jax.compact.optimizers import check
from sparse_jax.compact.plan import Plan, plan
from sparse_jax.compact.prepare import prepare
from sparse_jax.compact.probe import probes, with_probes

__all__ = [
    'Plan',
    'check',
    'compress',
    'expand',
    'fits',
    'init',
    'masks',
    'move',
    'plan',
    'prepare',
    'probes',
    'reserve',
    'with_probes',
]
