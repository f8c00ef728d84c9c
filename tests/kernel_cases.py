"""Fixed cases of the sparse products against float64, for processes of their own: other compiler flags, sanitizers, numbers of threads.

python -m tests.kernel_cases        prints the digest of all results of the C++ kernels
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
    (1, 3, 3, 1, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1.0, None),
    (2, 4, 4, 6, 6, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.0, None),
    # so many patches that there are more tiles than threads, and parts of the weight gradient
    (40, 12, 12, 20, 24, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.3, None),
    (40, 13, 13, 9, 40, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 0.2, None),
    (20, 2, 2, 16, 130, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.1, None),
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


def main() -> None:
    from sparse_jax.kernels import cpu

    if reason := cpu.unavailable():
        sys.exit(reason)
    digest = hashlib.sha256()
    for case in CASES:
        for seed in range(2):
            got, wrong = errors(case, 'cpu', seed)
            assert max(wrong) < 2e-6, (case, wrong)
            for array in got:
                digest.update(np.asarray(array).tobytes())
    print(digest.hexdigest())


if __name__ == '__main__':
    main()
