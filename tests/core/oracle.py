"""One mask update by loops, sorting and Python integers: the semantics once more, sharing no code with the library."""

import math

import numpy as np


def _finite(x) -> bool:
    return math.isfinite(float(x))


def _score(x) -> float:
    return float(x) if _finite(x) else 0.0


def mean_magnitude(m: np.ndarray, mask: np.ndarray) -> np.float32:
    """Mean |m| over the mask: 24-bit integers relative to the largest, summed exactly; valid below 2^12 elements."""
    values = [abs(_score(np.float32(x))) for x, on in zip(m.ravel(), mask.ravel(), strict=True) if on]
    largest = max(values, default=0.0)
    if largest == 0.0:
        return np.float32(0)
    exponent = max(math.frexp(largest)[1], -125)  # largest < 2^exponent; denormals have the smallest normal exponent
    total = sum(math.floor(v * 2.0 ** (24 - exponent) + 0.5) for v in values)
    mean = float(np.float32(total) / np.float32(len(values))) * 2.0 ** (exponent - 24)
    return np.float32(mean if mean >= np.finfo(np.float32).tiny else 0)  # XLA on CPU flushes denormal results


def weights(shares: list[np.float32]) -> list[int]:
    usable = [s if np.isfinite(s) and s > 0 else np.float32(0) for s in shares]
    largest = max(usable)
    return [int(np.rint(np.float32(s / largest) * np.float32(2**20))) if largest > 0 else 0 for s in usable]


def prune_counts(rate, nonzeros, sizes, prunable, w) -> list[int]:
    rate, counts = np.float32(rate), []
    for n, size, can, wl in zip(nonzeros, sizes, prunable, w or [0] * len(sizes), strict=True):
        layer_rate, missing = rate, size - n
        if w and 5 * missing < size and wl * len(sizes) > sum(w):
            layer_rate = min(rate, np.float32(missing) / np.float32(size))
        counts.append(max(0, min(int(np.ceil(layer_rate * np.float32(n))), can, n - 1)))
    return counts


def targets(pruned, w, room) -> list[int]:
    total, sum_w = sum(pruned), sum(w or [])
    if not sum_w:
        return list(pruned)
    base = [min(c, total * wl // sum_w) for c, wl in zip(room, w, strict=True)]
    extra = 0
    while extra <= max(room) and sum(min(c, b + extra + 1) for c, b in zip(room, base, strict=True)) <= total:
        extra += 1
    target = [min(c, b + extra) for c, b in zip(room, base, strict=True)]
    open_layers = [i for i in range(len(room)) if target[i] < room[i]]
    for i in sorted(open_layers, key=lambda i: (-(total * w[i] % sum_w), i))[: total - sum(target)]:
        target[i] += 1
    return target


def update(layers, rate, redistribute=True):
    """One update.

    Args:
      layers: a list of dictionaries with p, u, m (arrays of one dtype each) and mask.
      rate: prune rate.
      redistribute: whether the growth is shared out by mean momentum.

    Returns:
      A list of (new mask, updates), and the lists of pruned and target counts.
    """
    with np.errstate(all='ignore'):
        q = [(layer['p'] + layer['u']).astype(layer['p'].dtype).ravel() for layer in layers]
    masks = [layer['mask'].ravel() for layer in layers]
    fixed = [[not _finite(x) for x in ql] for ql in q]
    nonzeros = [int(m.sum()) for m in masks]
    prunable = [sum(on and not f for on, f in zip(m, fl, strict=True)) for m, fl in zip(masks, fixed, strict=True)]
    w = weights([mean_magnitude(layer['m'], layer['mask']) for layer in layers]) if redistribute else None
    pruned = prune_counts(rate, nonzeros, [m.size for m in masks], prunable, w)

    kept = []
    for ql, mask, fl, r in zip(q, masks, fixed, pruned, strict=True):
        order = sorted((i for i in range(mask.size) if mask[i] and not fl[i]), key=lambda i: (abs(_score(ql[i])), i))
        after = mask.copy()
        after[order[:r]] = False
        kept.append(after)
    room = [sum(not on and not f for on, f in zip(k, fl, strict=True)) for k, fl in zip(kept, fixed, strict=True)]
    target = targets(pruned, w, room)

    result = []
    for layer, old, after, fl, g in zip(layers, masks, kept, fixed, target, strict=True):
        m = layer['m'].ravel()
        order = sorted((i for i in range(old.size) if not after[i] and not fl[i]), key=lambda i: (-abs(_score(m[i])), i))
        new = after.copy()
        new[order[:g]] = True
        delta = np.where(old & new, layer['u'].ravel(), -layer['p'].ravel())
        result.append((new.reshape(layer['p'].shape), delta.reshape(layer['p'].shape)))
    return result, pruned, target
