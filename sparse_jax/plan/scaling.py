r"""The loss of a sparse language model by its size, density and text: a published law, within the range that it was fitted in.

.. math:: L(N, s, D) = 2.348 + 188.8 f(s) N^{-0.3268} + 447.2 D^{-0.3268}, \quad f(s) = s^{-0.00968} - 0.2729 (1 - s)^{0.8466}

N counts the parameters that exist, embeddings too, s is the density and D the number of tokens, each seen once. It was fitted to LLaMA networks
of 20 million to 1.92 billion parameters on C4, trained by SET at densities from 1 to 1/16, 232 runs.

Reference: `When Data Is Scarce <https://arxiv.org/abs/2606.01155>`_, 2026.
"""

from typing import NamedTuple

PARAMETERS = (20e6, 1.92e9)  # of the dense networks
DENSITIES = (0.0625, 1.0)
_IRREDUCIBLE, _OF_PARAMETERS, _OF_TOKENS, _EXPONENT = 2.348, 188.8, 447.2, 0.3268


def of_density(density: float) -> float:
    """f(s): what the term of the parameters is at a density, against a dense network with as many parameters.

    >>> [round(of_density(s), 3) for s in (1, 0.5, 0.25, 0.125, 0.0625)]
    [1.0, 0.855, 0.8, 0.777, 0.769]
    """
    return density**-0.00968 - 0.2729 * (1 - density) ** 0.8466


def loss(active: float, density: float, tokens: float) -> float:
    """Predicted loss, nats a token.

    Args:
      active: parameters that exist.
      density: share of the parameters that exist.
      tokens: of the training, each seen once.

    Returns:
      The loss on held-out text.

    Raises:
      ValueError: outside of the range that the law was fitted in.

    Example:
      >>> round(loss(80e6, 1.0, 1.3e9), 3), round(loss(80e6, 0.125, 1.3e9), 3)
      (3.311, 3.201)
    """
    if not DENSITIES[0] <= density <= DENSITIES[1]:
        raise ValueError(f'the law holds for densities from {DENSITIES[0]} to 1, not {density:g}.')
    if not PARAMETERS[0] <= active / density <= PARAMETERS[1]:
        raise ValueError(
            f'the law holds for networks of {PARAMETERS[0]:.3g} to {PARAMETERS[1]:.3g} parameters before sparsity, not {active / density:.3g}.'
        )
    if tokens <= 0:
        raise ValueError(f'tokens={tokens!r}: must be above 0.')
    return _IRREDUCIBLE + _OF_PARAMETERS * of_density(density) / active**_EXPONENT + _OF_TOKENS / tokens**_EXPONENT


class Choice(NamedTuple):
    """What a density comes to for a number of raw parameters."""

    density: float
    active: float
    loss: float


def choices(parameters: float, tokens: float, densities: tuple[float, ...] = (1, 0.5, 0.25, 0.125, 0.0625)) -> list[Choice]:
    """The loss at several densities of a network of so many parameters before sparsity; those outside of the law's range are left out.

    >>> [round(choice.loss, 3) for choice in choices(80e6, 1.3e9)]
    [3.311, 3.347, 3.439, 3.574, 3.757]
    """
    rows = []
    for density in densities:
        try:
            rows.append(Choice(density, parameters * density, loss(parameters * density, density, tokens)))
        except ValueError:
            continue
    return rows
