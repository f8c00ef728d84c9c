"""Tile sizes of the kernels: by a rule, or as they were measured on the device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.core import errors
from sparse_jax.kernels import device, store
from sparse_jax.kernels.gpu import shipped

ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # an accumulator in registers
SHARED_MEMORY = 232_448  # bytes that a program may have on Hopper
_HALF_SHARED_MEMORY = 114_688  # bytes up to which two programs share a multiprocessor: one loads while the other multiplies
BARRIERS = 1024  # bytes at most
_ALIGNMENT = 1024  # bytes, of which each buffer takes a multiple
_FILE = 'gpu_configs.json'
SPLIT_M = 256  # images, which every block_m divides: the weight gradient's sums are split between such
_NUM_PROGRAMS = 128  # about as many as there are multiprocessors
_MIN_SPLIT = 512  # images times pixels that a program of the weight gradient adds up at least


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel.

    As in a matrix product, m counts images (tokens) and k what x is multiplied over. In the weight gradient, dw = x.T @ dy, m is
    what is summed over, and k and n are the sides of a unit.

    Attributes:
      block_m: images (of a matrix product: tokens) of a tile, a multiple of 64: rows of a product's result, and what the weight
        gradient adds up in one step.
      block_k: channels of a unit that a product multiplies in one step; the weight gradient does not use it.
      num_stages: tiles in flight, at least 3: one is multiplied, one waits for the tensor cores, the others are being loaded
        (``max_concurrent_steps`` of the pipeline).
      units_per_program: units that a program of the weight gradient owns, and for which it reads dy once; products do not use it.
    """

    block_m: int = 128
    block_k: int = 64
    num_stages: int = 4
    units_per_program: int = 1

    def bytes(self, kernel: str, block: tuple[int, int], itemsize: int = 2) -> int:
        """Of shared memory, without barriers: the ring of stages, and the tiles of the result.

        >>> Config().bytes('forward', (64, 64)), Config(64, num_stages=3, units_per_program=2).bytes('weight_gradient', (64, 64))
        (114688, 106496)
        """
        inputs, outputs = block
        if kernel in ('forward', 'input_gradient'):
            unit_k, block_n = (inputs, outputs) if kernel == 'forward' else (outputs, inputs)
            block_k = min(unit_k, self.block_k)
            return itemsize * (self.num_stages * block_k * (self.block_m + block_n) + self.block_m * block_n)
        window_k = window_rows(kernel, inputs)
        # of a unit, in float32; a gradient that is not split has less
        result = max(_ALIGNMENT, 4 * window_k * (outputs if kernel == 'weight_gradient' else 1))
        stage = self.block_m * (outputs + self.units_per_program * window_k)
        return itemsize * self.num_stages * stage + self.units_per_program * result

    def registers(self, kernel: str, block: tuple[int, int]) -> int:
        """Of accumulators, a thread: float32, spread over the 128 threads of a warpgroup."""
        inputs, outputs = block
        if kernel in ('forward', 'input_gradient'):
            return self.block_m * (outputs if kernel == 'forward' else inputs) // 128
        return window_rows(kernel, inputs) * outputs * self.units_per_program // 128

    def fits(self, kernel: str, block: tuple[int, int]) -> bool:
        """Whether a program may have that much shared memory, and its threads that many registers beside what else they need."""
        return self.bytes(kernel, block) + BARRIERS <= SHARED_MEMORY and self.registers(kernel, block) <= 128


def window_rows(kernel: str, inputs: int) -> int:
    """Rows of a result of the weight gradient, for blocks of so many inputs: a tensor core's has 64 at least. Scores are of all blocks,
    so that several share a window."""
    return max(inputs, 128 if kernel == 'scores' else 64)


def candidates(kernel: str, block: tuple[int, int], images: int) -> list[Config]:
    """What a sweep tries: all that fits into shared memory and registers, and at least three stages.

    >>> len(candidates('forward', (64, 64), 8192)) > 5
    True
    """
    is_product = kernel in ('forward', 'input_gradient')
    configs = []
    for block_m in (64, 128, 256):
        for block_k in (32, 64, 128) if is_product else (64,):
            for units_per_program in (1,) if is_product else (1, 2, 4):
                for num_stages in (3, 4, 5, 6):
                    config = Config(block_m, block_k, num_stages, units_per_program)
                    divides = not is_product or block_k <= (block[0] if kernel == 'forward' else block[1])
                    if config.fits(kernel, block) and divides and block_m < 2 * max(images, 64):
                        configs.append(config)
    return configs


def rule(kernel: str, block: tuple[int, int], images: int) -> Config:
    """The config of a shape where none was measured: tiles that waste least, stages so that two programs share a multiprocessor.

    >>> rule('forward', (64, 64), 8192)
    Config(block_m=128, block_k=64, num_stages=4, units_per_program=1)
    >>> rule('weight_gradient', (64, 64), 8192)
    Config(block_m=64, block_k=64, num_stages=3, units_per_program=2)
    """
    is_product = kernel in ('forward', 'input_gradient')
    block_k = min(64, block[0] if kernel == 'forward' else block[1])
    configs = [
        Config(block_m, block_k, num_stages, units_per_program)
        for num_stages in (4, 3)
        for units_per_program in ((1,) if is_product else (2, 1))
        for block_m in ((128, 64) if is_product else (64,))
    ]

    def preference(config: Config):
        """Few wasted rows first, then the least traffic, then two programs a multiprocessor, then more in flight."""
        wasted = -images % config.block_m
        two_programs = config.bytes(kernel, block) <= _HALF_SHARED_MEMORY
        return -wasted, config.units_per_program, config.block_m, two_programs, config.num_stages

    return max((config for config in configs if config.fits(kernel, block)), key=preference)


def num_splits(images: int, pixels: int, units: int, block: tuple[int, int]) -> int:
    """Parts of the images and pixels that the weight gradient is summed over by different programs: as many, in powers of two, as keep a
    GPU busy where a tenth of the units exists. Each part of the sums is written and read once, in float32.

    Args:
      images: of the batch; tokens of a matrix product.
      pixels: of the result.
      units: that the weight could have.
      block: inputs and outputs.

    >>> num_splits(8192, 1, 64 * 64, (64, 64)), num_splits(8192, 1, 16 * 64, (64, 64)), num_splits(128, 32 * 32, 9 * 4 * 4, (64, 64))
    (1, 2, 16)
    """
    programs = max(1, units / (20 if math.prod(block) <= 64 * 64 else 10))  # two units a program, or one
    most = max(1, min(max(pixels, -(-images // SPLIT_M)), images * pixels // _MIN_SPLIT))
    return min(1 << max(0, round(math.log2(_NUM_PROGRAMS / programs))), 1 << (most.bit_length() - 1))


def key(kernel: str, x: tuple[int, ...], w: tuple[int, ...], block: tuple[int, int], dtype) -> str:
    """What decides a kernel's best config, but for its density."""
    return f'{kernel} {"x".join(map(str, x))} {"x".join(map(str, w))} {block[0]}x{block[1]} {jnp.dtype(dtype).name}'


def choose(kernel: str, x: tuple[int, ...], w: tuple[int, ...], block: tuple[int, int], dtype) -> Config:
    """The config that was measured to be the best for these shapes on this device, here or by what comes with the package, or else by
    rule.

    Args:
      kernel: 'forward', 'input_gradient', 'weight_gradient' or 'scores'.
      x: shape of the images.
      w: shape of the weight.
      block: inputs and outputs.
      dtype: of both.
    """
    return measured().get(key(kernel, x, w, block, dtype)) or _shipped(kernel, x, w, block, dtype) or rule(kernel, block, x[0])


def _shipped(kernel: str, x: tuple[int, ...], w: tuple[int, ...], block: tuple[int, int], dtype) -> Config | None:
    """What comes with the package for this kind of device: of a weight, whatever the number of images, which its tiles must divide."""
    if device.is_absent():
        return None
    fields = shipped.tiles(jax.devices()[0].device_kind, kernel, w, block, jnp.dtype(dtype).name)
    return Config(**fields) if fields and x[0] % fields['block_m'] == 0 else None


def measured() -> dict[str, Config]:
    """What :func:`write` kept for this device; nothing where programs are traced for another machine.

    An entry with other fields, as an earlier version of this library wrote, counts as not measured.
    """
    if device.is_absent():
        return {}
    stored = _stored()
    if None in stored.values():
        errors.say_once(
            f'sparse_jax: {_FILE} has tile sizes of another version, which are ignored: run python -m benchmarks.gpu again.'
        )
    return {name: config for name, config in stored.items() if config}


def write(configs: dict[str, Config]) -> None:
    """Keeps the best configs of this device, for all later processes of this user."""
    kept = {name: config for name, config in _stored().items() if config} | configs
    device_kind = jax.devices()[0].device_kind
    store.write(_FILE, store.read(_FILE) | {device_kind: {name: dataclasses.asdict(config) for name, config in kept.items()}})


def _stored() -> dict[str, Config | None]:
    """All entries of this device; None for those that are not a config's fields."""
    entries = store.read(_FILE).get(jax.devices()[0].device_kind, {})
    return {name: _parse(fields) for name, fields in entries.items()} if isinstance(entries, dict) else {}


def _parse(fields: Any) -> Config | None:
    names = {field.name for field in dataclasses.fields(Config)}
    valid = isinstance(fields, dict) and fields.keys() == names and all(type(size) is int for size in fields.values())
    return Config(**fields) if valid else None


def swizzled(dtype, *columns: int) -> tuple:
    """How tiles lie in shared memory, for the tensor cores: eight rows of at most 128 bytes by eight rows, the same for both operands.

    Args:
      dtype: of the tiles.
      *columns: of each tile that must lie in the same way.
    """
    itemsize = jnp.dtype(dtype).itemsize
    width = min(128, itemsize * math.gcd(*columns))
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)
