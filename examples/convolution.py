"""What a convolution is, four ways: directly, as a matrix product of patches, by Fourier transforms, and sparse.

    python examples/convolution.py [PICTURE.png]

A convolution slides a small kernel over an image. At each place it multiplies the pixels below the kernel with the kernel's weights and adds
them up: the result is large where the image looks like the kernel. A layer of a network does that for many kernels over many channels.

The same sums can be computed in several ways, which differ in how much they compute and move:

- directly: for each tap of the kernel the shifted image is multiplied with one matrix, channels to outputs;
- im2col: all patches are written as rows of a matrix, which is multiplied once. As many operations, more memory, one large product;
- by the convolution theorem: a convolution of images is a product of their Fourier transforms, frequency by frequency. For large kernels
  that is less work; for 3x3 it is not;
- sparse: weights that are zero are left out. At a density of 5% it is a twentieth of the operations.

The example checks that all four agree to 1e-5, counts and times them, and draws what one kernel does to a picture. Run it in the repository,
with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``. Cost: half a minute on a CPU.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sparse_jax as sj
from sparse_jax import data
from sparse_jax.plan import convolution

BATCH, SIDE, INPUTS, OUTPUTS, TAPS, DENSITY = 16, 28, 32, 32, 5, 0.05


def direct(image, kernel):
    """One matrix product a tap, of the image shifted by it; [n, h, w, c] and [k, k, c, o] to [n, h, w, o]."""
    half = kernel.shape[0] // 2
    padded = jnp.pad(image, ((0, 0), (half, half), (half, half), (0, 0)))
    shifted = lambda i, j: padded[:, i : i + image.shape[1], j : j + image.shape[2]]
    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return sum(shifted(i, j) @ kernel[i, j] for i, j in taps)


def im2col(image, kernel):
    """All patches as rows of one matrix, which is multiplied once."""
    half, (taps, _, inputs, outputs) = kernel.shape[0] // 2, kernel.shape
    padded = jnp.pad(image, ((0, 0), (half, half), (half, half), (0, 0)))
    patches = [padded[:, i : i + image.shape[1], j : j + image.shape[2]] for i in range(taps) for j in range(taps)]
    rows = jnp.stack(patches, axis=-2).reshape(-1, taps * taps * inputs)
    return (rows @ kernel.reshape(-1, outputs)).reshape(*image.shape[:3], outputs)


def fourier(image, kernel):
    """Products of transforms; they are of a circle, so that image and kernel are padded until nothing wraps around."""
    height, width = image.shape[1:3]
    half = kernel.shape[0] // 2
    size = height + 2 * half, width + 2 * half
    frequencies = jnp.fft.rfft2(image, size, axes=(1, 2))
    weights = jnp.fft.rfft2(kernel[::-1, ::-1], size, axes=(0, 1))  # networks do not turn the kernel around, the theorem does
    product = jnp.einsum('nhwc,hwco->nhwo', frequencies, weights)
    return jnp.fft.irfft2(product, size, axes=(1, 2))[:, half : half + height, half : half + width]


def seconds(function, *arguments):
    """The shortest of ten calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def draw(digit, path):
    """An edge, found by one kernel: the picture, the kernel, and what comes of it."""
    edges = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
    found = direct(digit[None, :, :, None], edges[:, :, None, None])[0, :, :, 0]
    figure = Figure(figsize=(9, 3.2), layout='constrained')
    shown = (
        ('the image', digit, 'gray'),
        ('the kernel: right minus left', edges, 'RdBu'),
        ('the convolution: vertical edges', found, 'RdBu'),
    )
    for axes, (title, values, colours) in zip(figure.subplots(1, 3), shown, strict=True):
        limit = float(np.abs(values).max())
        axes.imshow(values, cmap=colours, vmin=-limit if colours == 'RdBu' else 0, vmax=limit)
        axes.set(title=title, xticks=[], yticks=[])
        if values.shape == (3, 3):
            for i, j in np.ndindex(3, 3):
                axes.text(j, i, f'{values[i, j]:g}', ha='center', va='center', color='white' if abs(values[i, j]) > 1 else 'black')
    figure.savefig(path, dpi=120)


keys = jax.random.split(jax.random.key(0), 3)
image = jax.random.normal(keys[0], (BATCH, SIDE, SIDE, INPUTS))
dense = jax.random.normal(keys[1], (TAPS, TAPS, INPUTS, OUTPUTS)) / np.sqrt(TAPS * TAPS * INPUTS)
params, masks = sj.prune({'kernel': dense}, DENSITY)
pruned = params['kernel']
pattern = sj.kernels.make_pattern(np.asarray(masks['kernel']), name='kernel')

ways = {'direct': direct, 'im2col': im2col, 'FFT': fourier}
expected = np.asarray(sj.kernels.convolve(image, pruned))
for name, way in ways.items():
    error = float(np.abs(jax.jit(way)(image, pruned) - expected).max())
    print(f'{name:8} differs from XLA by {error:.1e}')
    assert error < 1e-5, name
sparse = jax.jit(lambda image, kernel: sj.kernels.sparse_conv(image, kernel, pattern))
error = float(np.abs(sparse(image, pruned) - expected).max())
print(f'{"sparse":8} differs from XLA by {error:.1e}\n')
assert error < 1e-5

layer = convolution.Layer(SIDE, SIDE, INPUTS, OUTPUTS, (TAPS, TAPS))
costs = {cost.algorithm.partition(',')[0]: cost for cost in convolution.algorithms(layer, BATCH, DENSITY)}
print(f'{"":14} {"million multiply-adds":>22} {"MB moved at least":>18} {"ms here":>8}')
for name, way in ways.items():
    print(
        f'{name:14} {1e-6 * costs[name].operations:>22,.0f} {1e-6 * costs[name].bytes:>18.1f} {1e3 * seconds(jax.jit(way), image, dense):>8.2f}'
    )
cost = costs['sparse direct']
print(f'{"sparse, 5%":14} {1e-6 * cost.operations:>22,.0f} {1e-6 * cost.bytes:>18.1f} {1e3 * seconds(sparse, image, pruned):>8.2f}')

path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else 'convolution.png')
digit = data.load('mnist_offline', 'data/mnist').train.inputs[7].reshape(28, 28).astype(np.float32)
draw(digit - digit.min(), path)
print(f'\npicture: {path}')
