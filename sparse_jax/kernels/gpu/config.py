"""Sizes of tiles: by a rule, or as they were measured on the device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.kernels import device, store

ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # sums in registers
SHARED_MEMORY = 232_448  # bytes that a program may have on Hopper
_OF_TWO = 114_688  # bytes up to which two programs share a multiprocessor: one loads while the other multiplies
BARRIERS = 1024  # bytes at most
_ALIGNED = 1024  # bytes, of which each buffer takes a multiple
_FILE = 'gpu_configs.json'
IMAGES = 256  # that all tiles divide: the weight gradient's sums are split between such
_PROGRAMS = 128  # about as many as there are multiprocessors
_SUMMED = 512  # images times pixels that a program of the weight gradient adds up at least


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one kernel.

    Attributes:
      tokens: images (of a matrix product: tokens) of a tile, a multiple of 64: rows of a product's result, and what the weight gradient
        adds up in one step.
      depth: features of a unit that a product takes in one step; the weight gradient has none.
      stages: tiles in flight, at least 3: one is multiplied, one waits for the tensor cores, the others are being loaded.
      group: units that a program of the weight gradient owns, and for which it reads dy once.
    """

    tokens: int = 128
    depth: int = 64
    stages: int = 4
    group: int = 1

    def bytes(self, kernel: str, block: tuple[int, int], size: int = 2) -> int:
        """Of shared memory, without barriers: the ring of stages, and the tiles of the result.

        >>> Config().bytes('forward', (64, 64)), Config(64, stages=3, group=2).bytes('weight_gradient', (64, 64))
        (114688, 106496)
        """
        rows, columns = block
        if kernel in ('forward', 'input_gradient'):
            depth, width = (rows, columns) if kernel == 'forward' else (columns, rows)
            depth = min(depth, self.depth)
            return size * (self.stages * depth * (self.tokens + width) + self.tokens * width)
        wide = window(kernel, rows)
        # of a unit, in float32; a gradient that is not split has less
        result = max(_ALIGNED, 4 * wide * (columns if kernel == 'weight_gradient' else 1))
        return size * self.stages * self.tokens * (columns + self.group * wide) + self.group * result

    def registers(self, kernel: str, block: tuple[int, int]) -> int:
        """Of sums, a thread: float32, spread over the 128 threads of a warpgroup."""
        rows, columns = block
        if kernel in ('forward', 'input_gradient'):
            return self.tokens * (columns if kernel == 'forward' else rows) // 128
        return window(kernel, rows) * columns * self.group // 128

    def fits(self, kernel: str, block: tuple[int, int]) -> bool:
        """Whether a program may have that much shared memory, and its threads that many registers beside what else they need."""
        return self.bytes(kernel, block) + BARRIERS <= SHARED_MEMORY and self.registers(kernel, block) <= 128


def window(kernel: str, rows: int) -> int:
    """Rows of a result of the weight gradient: a tensor core's has 64 at least. Scores are of all blocks, so that several share a window."""
    return max(rows, 128 if kernel == 'scores' else 64)


def candidates(kernel: str, block: tuple[int, int], images: int) -> list[Config]:
    """What a sweep tries: all that fits into shared memory and registers, and at least three stages.

    >>> len(candidates('forward', (64, 64), 8192)) > 5
    True
    """
    product = kernel in ('forward', 'input_gradient')
    known = []
    for tokens in (64, 128, 256):
        for depth in (32, 64, 128) if product else (64,):
            for group in (1,) if product else (1, 2, 4):
                for stages in (3, 4, 5, 6):
                    config = Config(tokens, depth, stages, group)
                    own = min(depth, block[0] if kernel == 'forward' else block[1])
                    if config.fits(kernel, block) and (not product or depth == own) and tokens < 2 * max(images, 64):
                        known.append(config)
    return known


def rule(kernel: str, block: tuple[int, int], images: int) -> Config:
    """The config of a shape where none was measured: tiles that waste least, stages so that two programs share a multiprocessor.

    >>> rule('forward', (64, 64), 8192)
    Config(tokens=128, depth=64, stages=4, group=1)
    >>> rule('weight_gradient', (64, 64), 8192)
    Config(tokens=64, depth=64, stages=3, group=2)
    """
    product = kernel in ('forward', 'input_gradient')
    depth = min(64, block[0] if kernel == 'forward' else block[1])
    own = [
        Config(tokens, depth, stages, group)
        for stages in (4, 3)
        for group in ((1,) if product else (2, 1))
        for tokens in ((128, 64) if product else (64,))
    ]
    fitting = [config for config in own if config.fits(kernel, block)]
    # few wasted rows first, then the least traffic, then two programs a multiprocessor, then more in flight
    return max(fitting, key=lambda c: (-(-images % c.tokens), c.group, c.tokens, c.bytes(kernel, block) <= _OF_TWO, c.stages))


def splits(images: int, pixels: int, units: int, block: tuple[int, int]) -> int:
    """Parts of the images and pixels that the weight gradient is summed over by different programs: as many, in powers of two, as keep a
    GPU busy where a tenth of the units exists. Each part of the sums is written and read once, in float32.

    Args:
      images: of the batch; tokens of a matrix product.
      pixels: of the result.
      units: that the weight could have.
      block: inputs and outputs.

    >>> splits(8192, 1, 64 * 64, (64, 64)), splits(8192, 1, 16 * 64, (64, 64)), splits(128, 32 * 32, 9 * 4 * 4, (64, 64))
    (1, 2, 16)
    """
    programs = max(1, units / (20 if math.prod(block) <= 64 * 64 else 10))  # two units a program, or one
    most = max(1, min(max(pixels, -(-images // IMAGES)), images * pixels // _SUMMED))
    return min(1 << max(0, round(math.log2(_PROGRAMS / programs))), 1 << (most.bit_length() - 1))


def key(kernel: str, x: tuple[int, ...], w: tuple[int, ...], block: tuple[int, int], dtype) -> str:
    """What decides a kernel's best config, but for its density."""
    return f'{kernel} {"x".join(map(str, x))} {"x".join(map(str, w))} {block[0]}x{block[1]} {jnp.dtype(dtype).name}'


def choose(kernel: str, x: tuple[int, ...], w: tuple[int, ...], block: tuple[int, int], dtype) -> Config:
    """The config that was measured to be the best for these shapes on this device, or else by rule.

    Args:
      kernel: 'forward', 'input_gradient', 'weight_gradient' or 'scores'.
      x: shape of the images.
      w: shape of the weight.
      block: inputs and outputs.
      dtype: of both.
    """
    known = measured().get(key(kernel, x, w, block, dtype))
    return Config(**known) if known else rule(kernel, block, x[0])


def measured() -> dict[str, dict[str, int]]:
    """What :func:`store` kept for this device; nothing where programs are traced for another machine."""
    return {} if device.is_absent() else store.read(_FILE).get(jax.devices()[0].device_kind, {})


def write(configs: dict[str, Config]) -> None:
    """Keeps the best configs of this device, for all later processes of this user."""
    content = store.read(_FILE)
    own = content.setdefault(jax.devices()[0].device_kind, {})
    own |= {name: dataclasses.asdict(config) for name, config in configs.items()}
    store.write(_FILE, content)


def swizzled(dtype, *columns: int) -> tuple:
    """How tiles lie in shared memory, for the tensor cores: eight rows of at most 128 bytes by eight rows, the same for both factors.

    Args:
      dtype: of the tiles.
      *columns: of each tile that must lie in the same way.
    """
    size = jnp.dtype(dtype).itemsize
    width = min(128, size * math.gcd(*columns))
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)
