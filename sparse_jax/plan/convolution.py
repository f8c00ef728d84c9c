"""Algorithms of a convolution: what each computes and moves, by formula, and which is least.

For an image [h, w, c], k x k taps, n outputs, stride 1 and 'SAME' padding unless said otherwise, a batch of b:

- direct: :math:`b h w k^2 c n` multiply-adds.
- im2col: the same multiply-adds as one matrix product of patches that are :math:`k^2` times the image, written and read once.
- FFT: transforms of images and kernels on tiles, one complex multiply-add a frequency, channel and output: :math:`(2.5 \\log_2 t^2)\\, t^2` operations a
  transform of a tile of side t, 3 real multiply-adds a complex one.
- Winograd F(2, 3), for 3 x 3 taps at stride 1: 16 multiplications for 4 outputs instead of 36, and transforms of 32 and 24 additions a tile.
- sparse direct: the density's part of direct.
"""

import math
from typing import NamedTuple


class Layer(NamedTuple):
    """A convolution for one example."""

    height: int
    width: int
    inputs: int
    outputs: int
    taps: tuple[int, int]
    stride: int = 1
    result: tuple[int, int] | None = None  # its height and width; None: those of the image over the stride


class Cost(NamedTuple):
    """What an algorithm does for a batch."""

    algorithm: str
    operations: float  # multiply-adds, or as many operations halved
    bytes: float  # that it moves at least, float32
    note: str = ''  # why it does not apply; empty where it does


def _sizes(layer: Layer, batch: int) -> tuple[int, int, int]:
    height, width = layer.result or (-(-layer.height // layer.stride), -(-layer.width // layer.stride))
    out = height * width
    image = batch * layer.height * layer.width * layer.inputs
    return image, batch * out * layer.outputs, layer.taps[0] * layer.taps[1] * layer.inputs * layer.outputs


def direct(layer: Layer, batch: int, density: float = 1.0) -> Cost:
    """Each output is a sum over taps and channels.

    >>> direct(Layer(32, 32, 64, 64, (3, 3)), 1).operations
    37748736
    """
    image, out, kernel = _sizes(layer, batch)
    operations = out // layer.outputs * kernel * density
    name = 'direct' if density == 1 else f'sparse direct, {density:.0%}'
    return Cost(
        name,
        operations if density < 1 else int(operations),
        4 * (image + out + 2 * density * kernel if density < 1 else image + out + kernel),
    )


def im2col(layer: Layer, batch: int) -> Cost:
    """Patches are written as rows of a matrix, and multiplied with the kernel."""
    image, out, kernel = _sizes(layer, batch)
    patches = out // layer.outputs * layer.taps[0] * layer.taps[1] * layer.inputs
    return Cost('im2col', out // layer.outputs * kernel, 4 * (image + 2 * patches + out + kernel))


def fft(layer: Layer, batch: int, tile: int = 32) -> Cost:
    """Tiles are transformed, multiplied frequency by frequency, and transformed back."""
    image, out, kernel = _sizes(layer, batch)
    if layer.stride != 1:
        return Cost('FFT', math.inf, math.inf, 'computes all positions, of which a stride keeps few')
    tile = min(tile, 2 ** math.ceil(math.log2(max(layer.height, layer.width) + max(layer.taps) - 1)))
    useful = tile - max(layer.taps) + 1
    tiles = batch * -(-layer.height // useful) * -(-layer.width // useful)
    transform = 2.5 * tile**2 * math.log2(tile**2) / 2  # in multiply-adds
    frequencies = tile * (tile // 2 + 1)  # of a real image
    transforms = tiles * (layer.inputs + layer.outputs) + layer.inputs * layer.outputs
    products = 3 * tiles * frequencies * layer.inputs * layer.outputs
    moved = 8 * frequencies * transforms * 2
    return Cost('FFT', transforms * transform + products, 4 * (image + out + kernel) + moved)


def winograd(layer: Layer, batch: int) -> Cost:
    """F(2 x 2, 3 x 3): tiles of 4 x 4 give 2 x 2 outputs."""
    image, out, kernel = _sizes(layer, batch)
    if layer.stride != 1 or layer.taps != (3, 3):
        return Cost('Winograd', math.inf, math.inf, 'is for 3x3 taps at stride 1')
    tiles = batch * -(-layer.height // 2) * -(-layer.width // 2)
    products = 16 * tiles * layer.inputs * layer.outputs
    transforms = (32 * tiles * layer.inputs + 24 * tiles * layer.outputs + 28 * layer.inputs * layer.outputs) / 2
    moved = 4 * 16 * (tiles * (layer.inputs + layer.outputs) + layer.inputs * layer.outputs) * 2
    return Cost('Winograd', products + transforms, 4 * (image + out + kernel) + moved)


def algorithms(layer: Layer, batch: int, density: float = 1.0) -> list[Cost]:
    """All of them, the least operations first; those that do not apply last.

    >>> [cost.algorithm for cost in algorithms(Layer(32, 32, 64, 64, (3, 3)), 64, density=0.05)][:2]
    ['sparse direct, 5%', 'Winograd']
    """
    rows = [direct(layer, batch), im2col(layer, batch), fft(layer, batch), winograd(layer, batch)]
    if density < 1:
        rows.append(direct(layer, batch, density))
    return sorted(rows, key=lambda cost: cost.operations)
