"""Where a weight's nonzeros are, as lists that kernels walk: made on the host when masks change, and an argument of the jitted step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from sparse_jax.core import errors
from sparse_jax.core import masks as masks_lib
from sparse_jax.kernels import rules, sharded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pattern:
    """The units of a weight that exist: single weights, or blocks of `block` inputs by outputs at each tap.

    The units of a weight [taps..., in, out] form an array [taps..., ceil(in / rows), ceil(out / columns)]. They are listed twice in
    compressed rows: by output, and by input for the transposed product. Patterns of layers that are stacked have a first axis on each
    array.

    Attributes:
      indices: int32[capacity]: input * taps + tap of each unit of output 0, then of output 1, ..., ascending; what is beyond the last
        pointer is not used.
      pointers: int32[outputs + 1]: those of output o are indices[pointers[o]:pointers[o + 1]].
      transposed_indices: int32[capacity]: output * taps + tap of each unit of input 0, then of input 1, ...
      transposed_pointers: int32[inputs + 1].
      shape: of the weight: [in, out], or [height, width, in, out].
      block: inputs and outputs of a unit; (1, 1) where single weights are units.
      implementation: which backend the layer takes; None: the one below, where it runs.
      by_rule: where none is named, the backend that its density suggests: on CPU ``'cpu'`` at 20% or less, elsewhere as measured (see rules.py), else
        ``'reference'``.
      dense_gradient: whether the weight's gradient is wanted at all positions.
      name: of the layer, for messages.
      split: how the layer lies on a mesh, and then, where that divides the weight, each array has a row for each part; None: one device.
    """

    indices: jax.Array | np.ndarray
    pointers: jax.Array | np.ndarray
    transposed_indices: jax.Array | np.ndarray
    transposed_pointers: jax.Array | np.ndarray
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    block: tuple[int, int] = dataclasses.field(default=(1, 1), metadata=dict(static=True))
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    by_rule: str = dataclasses.field(default='reference', metadata=dict(static=True))
    dense_gradient: bool = dataclasses.field(default=False, metadata=dict(static=True))
    name: str = dataclasses.field(default='', metadata=dict(static=True))
    split: sharded.Split | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        """Units there is room for."""
        return self.indices.shape[-1]

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of the array of units."""
        return *self.shape[:-2], -(-self.shape[-2] // self.block[0]), -(-self.shape[-1] // self.block[1])

    def with_capacity(self, capacity: int) -> 'Pattern':
        """The same units with room for at least so many, on the host."""
        missing = max(0, capacity - self.capacity)
        wider = lambda x: np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, missing)])
        return dataclasses.replace(self, indices=wider(self.indices), transposed_indices=wider(self.transposed_indices))


def capacity(count: int, most: int) -> int:
    """Room for so many units and as many again, in powers of two: a layer has to double before a step is compiled anew.

    Kernels do not visit what is beyond the last pointer: it costs 8 bytes a unit and no time (a GPU's weight gradient that is summed in
    parts reads it).

    >>> capacity(1000, 5000), capacity(1025, 2000), capacity(3, 9)
    (2048, 2000, 9)
    """
    return min(most, max(16, 1 << max(2 * count - 1, 0).bit_length()))


def make_pattern(
    mask: Any,
    *,
    block: tuple[int, int] | None = None,
    implementation: str | None = None,
    at_least: int = 0,
    name: str = '',
) -> Pattern:
    """The pattern of one weight's mask.

    Args:
      mask: concrete bool array of the weight's shape: [in, out], or [height, width, in, out] of a convolution.
      block: inputs and outputs of a block, where the mask consists of whole blocks at each tap (a side that does not divide ends in
        smaller ones, as in ``sj.granularity.Block``); None: unstructured.
      implementation: which backend the layer is to take; None: by rule.
      at_least: smallest capacity in units; the capacity of the pattern before keeps the compiled step.
      name: of the layer, for messages.

    Returns:
      The pattern, its arrays NumPy's: ``jax.device_put`` it once where many steps take it.

    Raises:
      ValueError: if the mask is traced, empty, not boolean, of another number of axes, or does not consist of whole blocks.

    Example:
      >>> import numpy as np
      >>> pattern = make_pattern(np.array([[True, False], [True, True]]))
      >>> pattern.pointers, pattern.indices[:3]
      (array([0, 2, 3], dtype=int32), array([0, 1, 1], dtype=int32))
    """
    if isinstance(mask, Tracer):
        raise ValueError(
            'make_pattern: mask is traced. Patterns are made on the host from concrete masks, and passed to the jitted step.'
        )
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.ndim not in (2, 4):
        raise ValueError(
            f'make_pattern: mask{_called(name)} must be a boolean array of 2 axes [in, out] or 4 [height, width, in, out], '
            f'got {mask.dtype}{list(mask.shape)}.'
        )
    if mask.size >= 2**31:
        raise ValueError(f'make_pattern: mask{_called(name)} of shape {mask.shape} has 2^31 elements or more: indices are int32.')
    shape = mask.shape
    if min(shape) == 0:
        raise ValueError(f'make_pattern: mask{_called(name)} of shape {shape} is empty.')
    if block is not None:
        block = int(block[0]), int(block[1])
        mask = _blocks(mask, block, name)
    units = mask.reshape(-1, *mask.shape[-2:])  # [taps, inputs, outputs]
    count = int(np.count_nonzero(units))
    room = max(at_least, capacity(count, units.size))
    by_rule = 'reference' if implementation else rules.by_rule(count / units.size, block or (1, 1))

    def listed(axes):
        """Units in compressed rows, in the order of these axes."""
        rows = np.ascontiguousarray(units.transpose(axes))
        rows = rows.reshape(len(rows), -1)
        padded = np.zeros(room, np.int32)
        found = np.flatnonzero(rows) % rows.shape[1]
        padded[: len(found)] = found
        return padded, np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))]).astype(np.int32)

    indices, pointers = listed((2, 1, 0))
    transposed, transposed_pointers = listed((1, 2, 0))
    return Pattern(indices, pointers, transposed, transposed_pointers, shape, block or (1, 1), implementation, by_rule, name=name)


def _called(name: str) -> str:
    return f' of {name}' if name else ''


def _blocks(mask: np.ndarray, block: tuple[int, int], name: str) -> np.ndarray:
    """The mask of units; ValueError where a block is partly there."""
    rows, columns = block
    if min(rows, columns) < 1 or mask.shape[-2] < rows or mask.shape[-1] < columns:
        raise ValueError(f'make_pattern: block={block} does not fit into the mask{_called(name)} of shape {mask.shape}.')
    units = mask[..., ::rows, ::columns]
    whole = np.repeat(np.repeat(units, rows, axis=-2), columns, axis=-1)[..., : mask.shape[-2], : mask.shape[-1]]
    if not np.array_equal(whole, mask):
        where = tuple(int(i) for i in np.argwhere(whole != mask)[0])
        raise ValueError(
            f'make_pattern: mask{_called(name)} does not consist of whole blocks of {rows}x{columns}: the block around {where} is '
            'there in part. Pass the block size of its granularity, or block=None.'
        )
    return units


def make_patterns(
    masks: Any,
    *,
    block: tuple[int, int] | None = None,
    stacked: Callable[[str, Any], bool] | None = None,
    implementations: Mapping[str, str] | None = None,
    previous: Any = None,
    shardings: Any = None,
) -> Any:
    """Patterns of a tree of masks, for a model's ``apply(..., patterns=)``.

    Args:
      masks: as ``sj.get_masks`` gives them, concrete.
      block: as in :func:`make_pattern`, for all of them.
      stacked: which leaves hold a layer in each row, as in ``sj.sparsify``; their patterns have a first axis, for ``lax.scan``.
      implementations: backends by the leaf's path, such as ``{'conv1/kernel': 'cpu'}``; ``'dense'`` makes a leaf's pattern None.
      previous: the patterns before, whose capacities are kept where they suffice, so that nothing is compiled anew.
      shardings: where the weights lie on a mesh with the axes 'data' and 'model': a tree of NamedSharding like the masks. Each device
        then has the pattern of its own part, and the layers run under ``shard_map``, the batch divided over 'data'. None: one device.

    Returns:
      The same tree with a :class:`Pattern` at sparse leaves; None at dense ones, and at those that are no matrix and no 2D
      convolution, or whose parts cut blocks.

    Raises:
      ValueError: as :func:`make_pattern`, and for a path in `implementations` that no leaf has.

    Example:
      >>> import jax.numpy as jnp
      >>> patterns = make_patterns({'fc': {'kernel': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)}})
      >>> patterns['fc']['bias'], patterns['fc']['kernel'].shape
      (None, (4, 4))
    """
    is_pattern = lambda x: x is None or isinstance(x, Pattern)
    before = {p.name: p for p in jax.tree.leaves(previous, is_leaf=is_pattern) if p is not None}
    chosen, leaves = implementations or {}, masks_lib.leaf_paths(masks)
    places = {} if shardings is None else dict(masks_lib.leaf_paths(shardings))
    for path in chosen:
        if path not in dict(leaves):
            raise errors.unknown('make_patterns: the leaf of implementations', path, dict(leaves))

    def make(path, mask):
        axes = np.ndim(mask)
        rows = stacked is not None and axes > 0 and stacked(path, mask)
        if axes - rows not in (2, 4) or chosen.get(path) == 'dense':
            return None
        own: dict[str, Any] = dict(block=block, implementation=chosen.get(path), name=path)
        old = before.get(path)
        if old is not None and old.shape == mask.shape[int(rows) :]:
            own['at_least'] = old.capacity

        def build(mask):
            if not rows:
                return make_pattern(mask, **own)
            mask = np.asarray(mask)  # rows of one array have one length, and take one backend
            first = make_pattern(max(mask, key=np.count_nonzero), **own)
            own['at_least'] = first.capacity
            slices = [dataclasses.replace(make_pattern(row, **own), by_rule=first.by_rule) for row in mask]
            return jax.tree.map(lambda *arrays: np.stack(arrays), *slices)

        if path not in places:
            return build(mask)
        split = sharded.split_of(places[path], mask.shape, block)
        return None if split is None else sharded.make(mask, split, build, bool(rows))

    return jax.tree.unflatten(jax.tree.structure(masks), [make(p, m) for p, m in leaves])


def with_dense_gradients(patterns: Any) -> Any:
    """The same patterns, with weight gradients at all positions: what growth needs before a mask update. Works on traced ones."""
    is_pattern = lambda x: isinstance(x, Pattern)
    return jax.tree.map(lambda p: dataclasses.replace(p, dense_gradient=True), patterns, is_leaf=is_pattern)
