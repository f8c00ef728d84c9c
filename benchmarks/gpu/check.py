"""The block-sparse kernels against the reference, on a GPU or in the interpreter."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import model
from benchmarks.gpu.model import Shape
from sparse_jax import compact, kernels
from sparse_jax.kernels import reference
from sparse_jax.kernels.reference import Geometry

# What --check runs: edges, strides, images that fill no tile, weight gradients in one part and in several.
CHECKED = (
    Shape((1000, 1, 1, 1000), (1, 1, 1000, 600)),
    Shape((128, 1, 1, 512), (1, 1, 512, 256)),
    Shape((48, 9, 7, 160), (3, 3, 160, 200), Geometry(padding=((1, 1), (1, 1)))),
    Shape((64, 8, 8, 128), (3, 3, 128, 128), Geometry((2, 2), ((1, 1), (1, 1)))),
    Shape((64, 8, 8, 128), (1, 1, 128, 256), Geometry((2, 2))),
)


def operands(shape: Shape, block: tuple[int, int], sparsity: float, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """x, w, dy and the pattern."""
    random, mask = np.random.default_rng(0), model.random_mask(shape, block, 1 - sparsity)
    draw = lambda s: jnp.asarray(random.standard_normal(s, np.float32), dtype)
    pattern = jax.device_put(kernels.make_pattern(mask, block=block, implementation='gpu'))
    return draw(shape.x), draw(shape.w) * mask.astype(dtype), draw(shape.y), pattern


def arguments(kernel: str, x, w, dy, pattern) -> tuple[Any, ...]:
    return {'forward': (x, w, pattern), 'input_gradient': (dy, w, pattern)}.get(kernel, (x, dy, pattern))


def expected(kernel: str, shape: Shape, x, w, dy, pattern, block: tuple[int, int]) -> jax.Array:
    """What the reference gives in float32, for the same rounded operands."""
    x, w, dy = (value.astype(jnp.float32) for value in (x, w, dy))
    with jax.default_matmul_precision('highest'):
        if kernel == 'forward':
            return reference.forward(x, w, pattern, shape.geometry)
        if kernel == 'input_gradient':
            return reference.input_gradient(dy, w, pattern, shape.geometry, shape.x)
        if kernel == 'weight_gradient':
            return reference.weight_gradient(x, dy, pattern, shape.geometry, shape.w)
        geometry: dict[str, Any] = dict(strides=shape.geometry.strides, padding=shape.geometry.padding)
        return kernels.block_scores(x, dy, shape.w, **geometry, block=block, implementation='reference')


def compact_result(kernel: str, shape: Shape, x, w, dy, block: tuple[int, int], mask: np.ndarray) -> jax.Array:
    """What a kernel makes of compact values, with room for a quarter more; gradients as whole arrays."""
    options: dict[str, Any] = dict(granularity=f'block:{block[0]}x{block[1]}', implementation='gpu')
    values, layout = compact.compress({'w': w}, {'w': mask}, **options)
    run, _ = model.compact_function(kernel, shape, layout['w'])
    result = jax.jit(run)(*arguments(kernel, x, values['w'], dy, compact.prepare(layout)['w']))
    return compact.expand({'w': result}, layout)['w'] if kernel == 'weight_gradient' else result


def error(
    kernel: str, shape: Shape, block: tuple[int, int], sparsity: float = 0.7, dtype: Any = jnp.bfloat16, *, is_compact: bool = False
) -> float:
    """Largest difference of a kernel from the reference, as a part of the largest value."""
    x, w, dy, pattern = operands(shape, block, sparsity, dtype)
    if is_compact:
        actual = compact_result(kernel, shape, x, w, dy, block, model.random_mask(shape, block, 1 - sparsity))
    else:
        actual = jax.jit(model.function(kernel, shape, block)[0])(*arguments(kernel, x, w, dy, pattern))
    actual = np.asarray(actual, np.float64)
    desired = np.asarray(expected(kernel, shape, x, w, dy, pattern, block), np.float64)
    if actual.shape != desired.shape:
        raise AssertionError(f'{kernel} of {shape.name}: shape {actual.shape} instead of {desired.shape}')
    return float(np.abs(actual - desired).max() / max(np.abs(desired).max(), 1e-30))


BOUNDS = {jnp.bfloat16: 0.51 * 2**-7, jnp.float16: 0.51 * 2**-10}  # one rounding to nearest, at the largest value, and float32 sums


def check(shapes: tuple[Shape, ...], blocks: Sequence[tuple[int, int]], names=model.KERNELS) -> None:
    """Every kernel against the reference; AssertionError where one is wrong."""
    print('| shape | block | type | ' + ' | '.join(names) + ' |\n|---|---|---|' + '---:|' * len(names))
    wrong = []
    for shape in shapes:
        for block in blocks:
            for dtype, bound in BOUNDS.items():
                errors = [error(kernel, shape, block, dtype=dtype) for kernel in names]
                wrong += [
                    f'{kernel}, {shape.name}, {block}: {e:.1e}' for kernel, e in zip(names, errors, strict=True) if not e <= bound
                ]
                cells = ' | '.join(f'{e:.1e}' for e in errors)
                print(f'| {shape.name} | {block[0]}x{block[1]} | {jnp.dtype(dtype).name} | {cells} |', flush=True)
    if wrong:
        raise AssertionError('not equal to the reference: ' + '; '.join(wrong))
    print('\nall equal to the reference within one rounding\n')
