"""Checkpoints: orbax with COMMIT_FILE atomicity, a format version, and a fingerprint that catches what orbax does not."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

FORMAT = 1


def _mix(x: jax.Array) -> jax.Array:  # lowbias32, an integer hash in the public domain (Chris Wellons)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _leaf_fingerprint(x: jax.Array) -> jax.Array:
    """uint32[2]: a sum of hashes of (index, bits). Integer sums do not depend on order, so neither on the mesh."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f'uint{min(x.dtype.itemsize * 8, 32)}')).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    hashed = _mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(hashed, dtype=jnp.uint32), jnp.sum(_mix(hashed + jnp.uint32(0x85EBCA6B)), dtype=jnp.uint32)])


@jax.jit
def _fingerprints(tree: Any) -> list[jax.Array]:
    return [_leaf_fingerprint(leaf) for leaf in jax.tree.leaves(tree)]


def fingerprint(tree: Any) -> str:
    """A 64-bit fingerprint of each leaf of a tree, in hexadecimal; the same on every mesh.

    Args:
      tree: pytree of arrays, typed random keys among them.

    Returns:
      16 digits a leaf, in the order of the leaves, joined by spaces.

    Example:
      >>> fingerprint(jnp.zeros(2)) == fingerprint(jnp.array([0.0, -0.0]))
      False
    """
    return ' '.join(f'{int(a):08x}{int(b):08x}' for a, b in map(np.asarray, _fingerprints(tree)))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, read_only: bool = False):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Starts to save; writing goes on in the background, and its failure is raised by the next call."""
        self._manager.check_for_errors()
        meta = {'format': FORMAT, 'batches': step, 'seconds': seconds, 'fingerprint': fingerprint(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True
        )

    def restore(self, step: int, target: Any) -> tuple[Any, float]:
        """A checkpoint's state and the seconds that were spent on it.

        Args:
          step: which.
          target: tree of shapes and dtypes that the state must have.

        Returns:
          The state, and seconds.

        Raises:
          ValueError: if the checkpoint cannot be read, is of another format, or its content is not what was saved.
        """
        where = f'the checkpoint {self._folder / str(step)}'
        remedy = 'delete its folder to go on from the one before, or the whole workdir to start anew.'
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
            version, expected, seconds = meta['format'], meta['fingerprint'], meta['seconds']
            if version == FORMAT:
                device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was saved
                target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                state = self._manager.restore(step, args=args)['state']
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = str(error).strip().split('\n')[0][:200] or type(error).__name__
            raise ValueError(f'{where} is damaged ({reason}): {remedy}') from error
        if version != FORMAT:
            raise ValueError(
                f'{where} has format {version}, this version reads {FORMAT}: use the version that wrote it, or {remedy}'
            )
        if fingerprint(state) != expected:
            raise ValueError(f'{where} is damaged (its content is not what was saved): {remedy}')
        return state, seconds

    def close(self) -> None:
        """Waits for the last save, and raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()
