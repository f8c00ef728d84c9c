"""Checkpoints: orbax with COMMIT_FILE atomicity, a format version, and a fingerprint that catches what orbax does not.

In one step: the state, with masks as a bit a weight, and beside it the data position (batches drawn), the seconds that were spent, what
arrays there are, and the fingerprint of the state, which is the same on every mesh. Formats before 3 hold a typed random key in a sparse
optimizer's state and not what its layers are; format 1 has masks as bytes and no list of arrays.
"""

import contextlib
import functools
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.core import layers as layers_lib
from sparse_jax.core.masks import SparsifyState
from sparse_jax.runtime import failures, records

FORMAT = 3
_READ = (1, 2, 3)
_LOG = logging.getLogger('sparse_jax')


class SaveError(RuntimeError):
    """A checkpoint that could not be written."""


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or whose content is not what was saved."""


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


_SMALL = 2**20  # elements of the arrays that are worked on together


def _by_size(leaves: list[Any], function: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """A function's results for some arrays: of all small ones in one call, of each large one in a call of its own, which is awaited.

    What it needs on the way is as large as its arrays. And several programs with collectives in flight at once would wait for each other
    for ever on CPU devices: each takes the threads that the other needs, and hosts begin them in different orders.
    """
    large = [i for i, x in enumerate(leaves) if x.size > _SMALL]
    small = [i for i, x in enumerate(leaves) if x.size <= _SMALL]
    results = {}
    for group in [small, *([i] for i in large)]:
        results |= dict(zip(group, jax.block_until_ready(function([leaves[i] for i in group])), strict=True)) if group else {}
    return [results[i] for i in range(len(leaves))]


_jitted = functools.cache(lambda sharding: jax.jit(lambda leaves: [_leaf_fingerprint(x) for x in leaves], out_shardings=sharding))


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
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(tree) if isinstance(getattr(x, 'sharding', None), NamedSharding)), None)
    hashed = _jitted(None if mesh is None else NamedSharding(mesh, P()))
    rows = jax.device_get(_by_size(jax.tree.leaves(tree), hashed))
    return ' '.join(f'{int(a):08x}{int(b):08x}' for a, b in rows)


def _is_mask(x: Any) -> bool:
    return x.dtype == jnp.bool_ and x.ndim > 0


_pack = jax.jit(lambda masks: [jnp.packbits(x, axis=-1) for x in masks])


def _packed(tree: Any) -> Any:
    """Masks as a bit a weight, eight of the last axis in a byte; other arrays as they are, not copied."""
    leaves, structure = jax.tree.flatten(tree)
    packed = iter(_by_size([x for x in leaves if _is_mask(x)], _pack))
    return structure.unflatten([next(packed) if _is_mask(x) else x for x in leaves])


def _unpacked(tree: Any, target: Any) -> Any:
    """The reverse; target: shapes and shardings."""

    def back(x, t):
        return jax.block_until_ready(_unpack(x, t.shape[-1], t.sharding)) if _is_mask(t) else x

    return jax.tree.map(back, tree, target)


def _unpack(x: jax.Array, count: int, sharding) -> jax.Array:
    return jax.jit(lambda x: jnp.unpackbits(x, axis=-1, count=count).astype(jnp.bool_), out_shardings=sharding)(x)


def _target_of_packed(target: Any) -> Any:
    """What is read: as the target, masks packed and, where that no longer divides, on every device."""

    def packed(t):
        if not _is_mask(t):
            return t
        shape, sharding = (*t.shape[:-1], -(-t.shape[-1] // 8)), t.sharding
        if isinstance(sharding, NamedSharding):
            axes = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
            last = axes[-1] if axes[-1] is None or shape[-1] % sharding.mesh.shape[axes[-1]] == 0 else None
            sharding = NamedSharding(sharding.mesh, P(*axes[:-1], last))
        return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)

    return jax.tree.map(packed, target)


class _StateBefore3(NamedTuple):
    """:class:`SparsifyState` as formats 1 and 2 hold it."""

    count: Any
    rng_key: Any  # typed
    masks: Any
    grown: Any
    inner_state: Any
    stats: Any
    method_state: Any


def _target_before_3(target: Any) -> Any:
    """The target with sparse optimizers' states as formats 1 and 2 hold them."""

    def older(state):
        if not isinstance(state, SparsifyState):
            return state
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=_replicated(state.rng_key.sharding))
        fields = state._asdict() | {'rng_key': key}
        return _StateBefore3(**{name: fields[name] for name in _StateBefore3._fields})

    return jax.tree.map(older, target, is_leaf=lambda x: isinstance(x, SparsifyState))


def _replicated(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _as_format_3(state: Any, target: Any, layers: Any) -> Any:
    """The reverse, with what the layers are filled in."""

    def newer(old, new):
        if not isinstance(old, _StateBefore3):
            return old
        key = jax.jit(jax.random.key_data, out_shardings=new.rng_key.sharding)(old.rng_key)
        put = jax.make_array_from_callback(layers.shape, new.layers.sharding, lambda index: layers[index])
        return SparsifyState(**old._asdict() | {'rng_key': key, 'layers': put})

    is_state = lambda x: isinstance(x, _StateBefore3 | SparsifyState)
    return jax.tree.map(newer, state, target, is_leaf=is_state)


def _arrays(tree: Any) -> dict[str, str]:
    """Type and shape of each array, by its path."""
    return {path: f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in layers_lib.leaf_paths(tree)}


def _meta(step: int, state: Any, seconds: float, totals: dict[str, int] | None) -> dict[str, Any]:
    """What is saved beside a state, with a checksum of its own."""
    meta = {'format': FORMAT, 'batches': step, 'seconds': seconds, 'fingerprint': fingerprint(state), 'arrays': _arrays(state)}
    meta |= {} if totals is None else {'totals': totals}
    return meta | {'checksum': _checksum(meta)}


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != 'checksum'}, sort_keys=True).encode())


def _check_descriptions(folder: pathlib.Path, read_only: bool) -> None:
    """Puts aside what orbax says of each checkpoint, handlers and times, where it cannot be read: orbax would open none of them.

    Nothing depends on it: the content has its own fingerprint.
    """
    for found in ocp.path.step.standard_name_format().find_all(folder.absolute()):
        path = folder / str(found.step) / '_CHECKPOINT_METADATA'
        try:
            _ = found.commit_timestamp  # as orbax does when it opens the folder
        except Exception as error:
            if read_only:
                raise DamagedError(
                    f'{path} cannot be read ({failures.reason(error)}): delete it; the checkpoint needs nothing of it.'
                ) from error
            with contextlib.suppress(FileNotFoundError):  # another host was quicker
                _LOG.warning(
                    '%s cannot be read: it was put aside as %s; the checkpoint needs nothing of it.', path, records.put_aside(path)
                )


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, read_only: bool = False):
        self._folder, self._saving = folder, None  # the step that is being saved
        _check_descriptions(folder, read_only)
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

    def save(self, step: int, state: Any, seconds: float, totals: dict[str, int] | None = None) -> None:
        """Starts to save; writing goes on in the background, and its failure is raised by :meth:`check`.

        Args:
          step: steps done.
          state: after that step.
          seconds: that were spent on it.
          totals: whole numbers that the run sums up over its steps, by name; :meth:`totals` gives them back.
        """
        self.check()
        meta = _meta(step, state, seconds, totals)
        self._saving = step
        content = ocp.args.Composite(state=ocp.args.StandardSave(_packed(state)), meta=ocp.args.JsonSave(meta))
        with self._told():
            self._manager.save(step, args=content, force=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the save that is going on, of whatever kind, as one."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            step, self._saving = self._saving, None
            raise SaveError(
                f'the checkpoint of step {step} could not be saved in {self._folder} ({failures.reason(error)}).'
            ) from error

    def check(self) -> None:
        """Raises SaveError where the last save went wrong, as soon as it is known."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            with self._told():
                self._manager.wait_until_finished()  # raises; orbax's check_for_errors does not, once its own thread has seen the error
            self._saving = None

    def totals(self, step: int) -> dict[str, int] | None:
        """The totals saved with a checkpoint, which has been restored and so is whole; None where it was saved without."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta'].get('totals')

    def restore(self, step: int, target: Any, layers: np.ndarray | None = None) -> tuple[Any, float]:
        """A checkpoint's state and the seconds that were spent on it.

        Args:
          step: which.
          target: tree of shapes and dtypes that the state must have; with shardings, it is put there, else on the first device. Or a
            function that gives it, of the step and of the types and shapes of the arrays that are there, by their paths.
          layers: what a sparse optimizer's state says of its layers, int32[leaves, 4]: for checkpoints of formats that do not hold it.

        Returns:
          The state, and seconds.

        Raises:
          DamagedError: if the checkpoint cannot be read, or its content is not what was saved.
          ValueError: if it is of another format, or holds other arrays.
        """
        where = f'the checkpoint {self._folder / str(step)}'
        remedy = 'delete its folder to go on from the one before, or the whole workdir to start anew.'
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
            version, expected, seconds = meta['format'], meta['fingerprint'], meta['seconds']
            if 1 < version <= FORMAT and meta['checksum'] != _checksum(meta):
                raise DamagedError('its record is not what was saved')
            if meta['batches'] != step:  # the position in the data, which counts the steps
                raise DamagedError(f'it is of step {meta["batches"]}, whatever its folder is called')
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise DamagedError(f'{where} is damaged ({failures.reason(error)}): {remedy}') from error
        if version not in _READ:
            raise ValueError(
                f'{where} has format {version}, this version reads {" and ".join(map(str, _READ))}: use the version that wrote it, or {remedy}'
            )
        if callable(target):
            target = target(step, meta.get('arrays', {}))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was saved
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), target)
        held = target if version > 2 else _target_before_3(target)
        if version > 1:
            self._check_arrays(where, meta['arrays'], _arrays(held))
        try:
            stored = held if version == 1 else _target_of_packed(held)
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored)))['state']
        except Exception as error:
            raise DamagedError(f'{where} is damaged ({failures.reason(error)}): {remedy}') from error
        if version > 1:
            state = _unpacked(state, held)
        if fingerprint(state) != expected:
            raise DamagedError(f'{where} is damaged (its content is not what was saved): {remedy}')
        if version < 3:
            if layers is None and jax.tree.structure(held) != jax.tree.structure(target):
                raise ValueError(f'{where} has format {version}, which does not say what the layers are: give layers=.')
            state = _as_format_3(state, target, layers)
        return state, seconds

    @staticmethod
    def _check_arrays(where: str, arrays: dict[str, str], expected: dict[str, str]) -> None:
        if different := [k for k in sorted(expected.keys() | arrays.keys()) if expected.get(k) != arrays.get(k)]:
            listed = '; '.join(f'{k}: {arrays.get(k, "nothing")} there, {expected.get(k, "nothing")} wanted' for k in different[:3])
            raise ValueError(
                f'{where} holds other arrays than this experiment ({len(different)} differ: {listed}): give another --workdir.'
            )

    def restore_newest(self, target: Any, layers: np.ndarray | None = None) -> tuple[int, Any, float] | None:
        """The newest checkpoint that is whole; those that are not are put aside, as N.corrupt.

        Args:
          target: as in :meth:`restore`.
          layers: as in :meth:`restore`.

        Returns:
          Step, state and seconds; None where nothing has been saved.

        Raises:
          ValueError: if there are checkpoints but none is whole: a run never starts anew by itself. And as :meth:`restore`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, *self.restore(step, target, layers)
            except DamagedError as error:
                aside = self._put_aside(step)
                _LOG.warning('%s It was put aside as %s.', str(error).partition(': delete')[0] + '.', aside)
                if jax.process_count() > 1:  # others may wait for this host within orbax: all begin again, one step before
                    raise RuntimeError(f'the checkpoint of step {step} is damaged; it was put aside: start again.') from error
        if aside := sorted(path.name for path in self._folder.glob('*.corrupt*')):
            raise ValueError(
                f'{self._folder} has no whole checkpoint, only damaged ones ({", ".join(aside)}): delete the workdir to start anew, or '
                'rename one back to look at it.'
            )
        return None

    def _put_aside(self, step: int) -> str:
        name = f'{step}.corrupt'
        with contextlib.suppress(FileNotFoundError):  # another host was quicker
            name = records.put_aside(self._folder / str(step))
        self._manager.reload()
        return name

    def wait(self) -> None:
        """Waits for the last save, whatever became of it."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, and raises SaveError if it failed."""
        with self._told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()
