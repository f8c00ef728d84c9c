"""Fixed cases of the sparse products against float64, for processes of their own: other compiler flags, sanitizers, numbers of threads.

python -m tests.kernels.kernel_cases        prints the digest of all results of the C++ kernels
"""

import hashlib
import sys

import numpy as np

# batch, height, width, in, out, taps, strides, padding before and after, dilation, density, block
CASES = [
    (2, 8, 8, 32, 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.2, None),
    (3, 7, 6, 5, 9, (3, 3), (2, 2), ((0, 1), (0, 1)), (1, 1), 0.3, None),
    (1, 5, 5, 20, 33, (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), 0.1, None),
    (2, 9, 9, 17, 3, (3, 2), (3, 1), ((2, 1), (0, 3)), (2, 1), 0.5, None),
    (33, 1, 1, 40, 50, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.1, None),
    (300, 1, 1, 33, 17, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.3, None),
    (4, 2, 2, 16, 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.2, None),
    (2, 9, 9, 16, 4, (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 0.05, None),
    (2, 6, 6, 16, 16, (1, 1), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.3, None),
    (2, 6, 6, 18, 10, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.2, (4, 4)),
    (70, 1, 1, 19, 23, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.3, (8, 4)),
    # few rows, whose lists are walked as they are
    (1, 1, 1, 60, 70, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.2, None),
    (16, 1, 1, 300, 200, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.3, None),
    (50, 1, 1, 100, 250, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.2, None),
    (128, 1, 1, 70, 90, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.1, None),
    (200, 1, 1, 400, 300, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 0.3, None),
    (1, 3, 3, 1, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1.0, None),
    (2, 4, 4, 6, 6, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.0, None),
    # so many patches that there are more tiles than threads, and parts of the weight gradient
    (40, 12, 12, 20, 24, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.3, None),
    (40, 13, 13, 9, 40, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.2, None),
    (20, 2, 2, 16, 130, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.1, None),
]  # fmt: skip

# strides, taps and dilations beyond the image; one pixel, one row, one channel
EXTREMES = [
    (4, 1, 1, 8, 8, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.2, None),
    (2, 2, 2, 5, 3, (3, 3), (3, 3), ((1, 1), (1, 1)), (1, 1), 0.5, None),
    (3, 1, 32, 4, 6, (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 0.5, None),
    (3, 1, 32, 4, 6, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.5, None),
    (2, 9, 1, 1, 1, (3, 1), (5, 7), ((1, 1), (0, 0)), (1, 1), 1.0, None),
    (2, 4, 4, 3, 5, (3, 3), (1, 1), ((9, 9), (9, 9)), (9, 9), 0.5, None),
    (2, 3, 3, 3, 5, (2, 2), (1, 1), ((0, 40), (40, 0)), (40, 40), 0.5, None),
    (1, 1, 1, 1, 1, (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), 1.0, None),
    (1, 2, 3, 2, 2, (2, 2), (4, 3), ((3, 3), (3, 3)), (1, 1), 0.7, None),
    (2, 3, 3, 8, 8, (3, 3), (4, 4), ((1, 1), (1, 1)), (1, 1), 0.4, (4, 4)),
    (1, 1, 4, 1, 300, (1, 3), (1, 9), ((0, 0), (1, 1)), (1, 1), 0.1, None),
    (1, 4, 1, 300, 1, (3, 1), (9, 1), ((1, 1), (0, 0)), (1, 1), 0.1, None),
]  # fmt: skip


def convolution(x, w, dy, strides, padding, dilation):
    """Output and both gradients in float64, tap by tap."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    d_padded, dw, y = np.zeros_like(padded), np.zeros_like(w), np.zeros(dy.shape)
    for a in range(w.shape[0]):
        for b in range(w.shape[1]):
            rows = slice(a * dilation[0], a * dilation[0] + (y.shape[1] - 1) * strides[0] + 1, strides[0])
            columns = slice(b * dilation[1], b * dilation[1] + (y.shape[2] - 1) * strides[1] + 1, strides[1])
            seen = padded[:, rows, columns]
            y += seen @ w[a, b]
            dw[a, b] = np.tensordot(seen, dy, ((0, 1, 2), (0, 1, 2)))
            d_padded[:, rows, columns] += dy @ w[a, b].T
    (top, bottom), (left, right) = padding
    return y, d_padded[:, top : d_padded.shape[1] - bottom, left : d_padded.shape[2] - right], dw


def make(case, seed: int = 0):
    """Arrays of a case: x, the mask, w and the output's gradient; where there is room an output has no weight and another has all."""
    n, height, width, inputs, outputs, taps, strides, padding, dilation, density, block = case
    random = np.random.default_rng(seed)
    rows, columns = block or (1, 1)
    units = random.random((*taps, -(-inputs // rows), -(-outputs // columns))) < density
    if 0 < density < 1 and units.shape[-1] > 2:
        units[..., 1], units[..., 2] = False, True
    mask = np.repeat(np.repeat(units, rows, axis=-2), columns, axis=-1)[..., :inputs, :outputs]
    x = random.standard_normal((n, height, width, inputs)).astype(np.float32)
    w = np.where(mask, random.standard_normal(mask.shape), 0).astype(np.float32)
    sides = [
        (side + sum(pad) - (tap - 1) * d - 1) // step + 1
        for side, pad, tap, d, step in zip((height, width), padding, taps, dilation, strides, strict=True)
    ]
    return x, mask, w, random.standard_normal((n, *sides, outputs)).astype(np.float32)


def errors(case, implementation: str, seed: int = 0):
    """(output, dx, dw) by one implementation, and the largest error of each against float64, relative to the largest value."""
    import jax
    import jax.numpy as jnp

    from sparse_jax import kernels

    strides, padding, dilation, block = case[6], case[7], case[8], case[10]
    x, mask, w, dy = make(case, seed)
    pattern = kernels.make_pattern(mask, block=block)
    options = dict(strides=strides, padding=padding, dilation=dilation, implementation=implementation)
    y, pull = jax.vjp(lambda x, w: kernels.sparse_conv(x, w, pattern, **options), jnp.asarray(x), jnp.asarray(w))
    got = y, *pull(jnp.asarray(dy))
    expected = list(convolution(x, w, dy, strides, padding, dilation))
    expected[2] = np.where(mask, expected[2], 0)
    largest = lambda a: max(np.abs(a).max(initial=0), 1e-30)
    return got, [float(np.abs(np.asarray(a) - b).max(initial=0) / largest(b)) for a, b in zip(got, expected, strict=True)]


def frozen(case, seed: int = 0):
    """The output with frozen weights by the C++ kernel, and its largest error against float64, relative to the largest value."""
    import jax.numpy as jnp

    from sparse_jax import kernels

    strides, padding, dilation, block = case[6], case[7], case[8], case[10]
    x, mask, w, dy = make(case, seed)
    weight = kernels.freeze(w, mask, **({} if block is None else dict(granularity=f'block:{block[0]}x{block[1]}')))
    options = dict(strides=strides, padding=padding, dilation=dilation, implementation='cpu')
    y = np.asarray(kernels.sparse_conv(jnp.asarray(x), weight, **options))
    expected = convolution(x, w, dy, strides, padding, dilation)[0]
    return y, float(np.abs(y - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def compact(case, got, seed: int = 0) -> bool:
    """Whether compact values give the bits of what the pattern gave (output, dx, dw) by the C++ kernel, and zeros beyond the last unit."""
    import jax
    import jax.numpy as jnp

    from sparse_jax import compact as compact_lib
    from sparse_jax import kernels

    strides, padding, dilation, block = case[6], case[7], case[8], case[10]
    x, mask, w, dy = make(case, seed)
    granularity = 'unstructured' if block is None else f'block:{block[0]}x{block[1]}'
    values, layout = compact_lib.compress({'w': w}, {'w': mask}, granularity=granularity, capacity_factor=1.5)
    options = dict(strides=strides, padding=padding, dilation=dilation, implementation='cpu')
    y, pull = jax.vjp(lambda x, v: kernels.sparse_conv(x, v, layout['w'], **options), jnp.asarray(x), values['w'])
    dx, d_values = pull(jnp.asarray(dy))
    expanded = compact_lib.expand({'w': d_values}, layout)['w']
    unused = np.asarray(d_values)[int(layout['w'].pointers[-1]) :]
    return not unused.any() and all(np.array_equal(a, b) for a, b in zip((y, dx, expanded), got, strict=True))


# batch, height, width, in, out, taps, stride, padding, density
BY_LANES = [
    (64, 8, 8, 20, 33, 3, 1, 1, 0.1),
    (16, 5, 7, 3, 6, 3, 1, 1, 0.5),
    (32, 9, 9, 17, 12, 3, 2, 1, 0.2),
    (64, 2, 2, 16, 70, 3, 1, 1, 0.1),
    (48, 6, 6, 9, 10, 1, 2, 0, 0.3),
    (16, 4, 4, 5, 5, 1, 1, 0, 0.0),
    (16, 7, 7, 4, 40, 5, 1, 2, 1.0),
    (16, 12, 12, 2, 3, 3, 1, 0, 0.3),
    # strides and taps beyond the image
    (16, 1, 1, 3, 4, 3, 2, 1, 0.5),
    (16, 2, 2, 4, 4, 3, 3, 1, 0.5),
    (16, 1, 32, 3, 5, 1, 2, 0, 0.5),
    (16, 1, 1, 1, 1, 5, 1, 2, 1.0),
]


def by_lanes(case, mode: str, seed: int = 0):
    """A normalised convolution by lanes with residual and moments, and all its gradients: results, and those of float64.

    Args:
      case: a row of BY_LANES.
      mode: 'sparse', 'dense' (without a pattern), or 'dense gradient'.
      seed: of all arrays. Values are such that ReLU's argument is never zero nor rounded.
    """
    import jax
    import jax.numpy as jnp

    from sparse_jax import kernels

    n, height, width, inputs, outputs, taps, stride, pad, density = case
    padding = ((pad, pad), (pad, pad))
    _, mask, w, dy = make((n, height, width, inputs, outputs, (taps, taps), (stride,) * 2, padding, (1, 1), density, None), seed)
    random = np.random.default_rng(seed)
    if mode == 'dense':
        w = random.standard_normal(w.shape).astype(np.float32)
    x = random.integers(-8, 9, (n, height, width, inputs)).astype(np.float32) / 4
    mean, scale = random.integers(-4, 5, inputs) / 4, random.choice([-1, 0.5, 1, 2], inputs)
    activation = np.stack([mean, scale, (2 * random.integers(-4, 4, inputs) + 1) / 16]).astype(np.float32)
    residual, d_moments = (
        random.standard_normal(dy.shape).astype(np.float32),
        random.standard_normal((2, outputs)).astype(np.float32),
    )

    pattern = None if mode == 'dense' else kernels.make_pattern(mask)
    if mode == 'dense gradient':
        pattern = kernels.with_dense_gradients(pattern)

    def function(x, activation, w, residual):
        x, residual = kernels.to_lanes(x), kernels.to_lanes(residual)
        own = dict(strides=(stride, stride), padding=padding, statistics=True)
        y, moments = kernels.convolve_by_lanes(x, activation, w, residual, pattern, **own)
        return kernels.from_lanes(y), moments

    (y, moments), pull = jax.vjp(function, *map(jnp.asarray, (x, activation, w, residual)))
    got = y, moments, *pull((jnp.asarray(dy), jnp.asarray(d_moments)))

    centred = np.asarray(x, np.float64) - activation[0]
    before = centred * activation[1] + activation[2]
    hidden = np.maximum(before, 0)
    strides = stride, stride
    product, _, _ = convolution(hidden, w, dy, strides, padding, (1, 1))
    out = product + residual
    average, variance = out.mean((0, 1, 2)), out.var((0, 1, 2))
    total = dy + (d_moments[0] + 2 * d_moments[1] * (out - average)) / (out.size / outputs)
    _, d_hidden, dw = convolution(hidden, w, total, strides, padding, (1, 1))
    passed = d_hidden * (before > 0)
    d_activation = np.stack([-(passed * activation[1]).sum((0, 1, 2)), (passed * centred).sum((0, 1, 2)), passed.sum((0, 1, 2))])
    dw = np.where(mask, dw, 0) if mode == 'sparse' else dw
    return got, (out, np.stack([average, variance]), passed * activation[1], d_activation, dw, total)


def pooled(case, window: tuple[int, int], seed: int = 0):
    """Maxima by lanes after normalisation and their gradients, and those of jnp.maximum; values have ties."""
    import functools

    import jax
    import jax.numpy as jnp

    from sparse_jax import kernels

    n, height, width, channels = case[:4]
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.integers(-3, 4, (n, height, width, channels)), jnp.float32)
    activation = jnp.asarray(random.integers(-2, 3, (3, channels)), jnp.float32)

    def plain(x, activation):
        hidden = jax.nn.relu((x - activation[0]) * activation[1] + activation[2])
        h, w = (side // step * step for side, step in zip(x.shape[1:3], window, strict=True))
        slices = [hidden[:, i : h : window[0], j : w : window[1]] for i in range(window[0]) for j in range(window[1])]
        return functools.reduce(jnp.maximum, slices)

    y, pull = jax.vjp(lambda x, a: kernels.from_lanes(kernels.max_pool_by_lanes(kernels.to_lanes(x), a, window)), x, activation)
    expected, expected_pull = jax.vjp(plain, x, activation)
    dy = jnp.asarray(random.integers(-4, 5, y.shape), jnp.float32)
    return (y, *pull(dy)), (expected, *expected_pull(dy))


def by_lanes_errors(case, mode: str, seed: int = 0):
    """Results by lanes, and the largest error of each, relative to the largest value (of sums: to what is summed)."""
    got, expected = by_lanes(case, mode, seed)
    largest = lambda a: max(np.abs(a).max(initial=0), 1.0)
    return got, [float(np.abs(np.asarray(a) - b).max(initial=0) / largest(b)) for a, b in zip(got, expected, strict=True)]


def main() -> None:
    from sparse_jax.kernels.cpu import operations as cpu

    if reason := cpu.unavailable():
        sys.exit(reason)
    digest = hashlib.sha256()
    for case in [*CASES, *EXTREMES]:
        for seed in range(2):
            got, wrong = errors(case, 'cpu', seed)
            assert max(wrong) < 2e-6, (case, wrong)
            assert compact(case, got, seed), case
            y, wrong = frozen(case, seed)
            assert wrong < 2e-6, (case, wrong)
            for array in (*got, y):
                digest.update(np.asarray(array).tobytes())
    for case in BY_LANES:
        for mode in ('sparse', 'dense', 'dense gradient'):
            got, wrong = by_lanes_errors(case, mode)
            assert max(wrong) < 1e-5, (case, mode, wrong)
            for array in got:
                digest.update(np.asarray(array).tobytes())
    for case in BY_LANES:
        for window in ((2, 2), (1, 3)):
            if case[1] >= window[0] and case[2] >= window[1]:
                got, expected = pooled(case, window)
                for array, other in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(array, other)
                    digest.update(np.asarray(array).tobytes())
    print(digest.hexdigest())


if __name__ == '__main__':
    main()
