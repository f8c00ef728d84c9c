"""The paper's augmentation of CIFAR: reflect-pad by 4, crop at random, flip at random. It depends only on (seed, epoch, index)."""

import numpy as np

PAD = 4


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies splitmix64's output function, a bijection of uint64 in which each bit depends on all others (Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """Hashes seed, epoch and index into random bits, so that any process computes the bits of any example by itself.

    Args:
      seed: seed of the run.
      epoch: number of the pass over the data, from 0.
      index: indices of the examples in the data set, int[n].

    Returns:
      Random bits of each example, uint64[n].

    Example:
      >>> bits = random_bits(0, 3, np.array([7, 8]))
      >>> bits[1] == random_bits(0, 3, np.array([8]))[0], bits[0] == bits[1]
      (np.True_, np.False_)
    """
    with np.errstate(over='ignore'):
        return _mix(_mix(_mix(np.array([seed], np.uint64)) ^ np.uint64(epoch)) ^ index.astype(np.uint64))


def offsets(bits: np.ndarray, flip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row and column of each crop's corner in the padded image, 0 to 8, and whether the crop is mirrored."""
    num_offsets = np.uint64(2 * PAD + 1)
    # the high bits of 16 random ones times 9: uneven by less than 2^-12
    row = (bits & np.uint64(0xFFFF)) * num_offsets >> np.uint64(16)
    column = (bits >> np.uint64(16) & np.uint64(0xFFFF)) * num_offsets >> np.uint64(16)
    mirrored = (bits >> np.uint64(32) & np.uint64(1)).astype(bool) & flip
    return row.astype(np.int64), column.astype(np.int64), mirrored


def crop_and_flip(images: np.ndarray, bits: np.ndarray, *, flip: bool = True) -> np.ndarray:
    """Reflect-pads each image by 4 pixels, crops it to its size at a random offset, and mirrors it with probability one half.

    Args:
      images: images [n, height, width, channels] of any dtype.
      bits: random bits from :func:`random_bits`, uint64[n].
      flip: whether images may be mirrored.

    Returns:
      Augmented images of the same shape and dtype.
    """
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode='reflect')
    row, column, mirrored = offsets(bits, flip)
    result = np.empty_like(images)
    for i, (y, x, mirror) in enumerate(zip(row.tolist(), column.tolist(), mirrored.tolist(), strict=True)):
        crop = padded[i, y : y + height, x : x + width]
        result[i] = crop[:, ::-1] if mirror else crop
    return result
