"""What a config would train: its counts, state and lengths, from shapes alone; no data is read and no device touched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax import kernels, models
from sparse_jax.core.granularity import Block
from sparse_jax.core.layers import Layer
from sparse_jax.core.rule import Rule
from sparse_jax.data import text
from sparse_jax.plan import counts as counts_lib
from sparse_jax.plan.counts import Counts
from sparse_jax.train import experiment as experiment_lib
from sparse_jax.train import memory_table
from sparse_jax.train import run as run_lib

# What is taken where a config's data decides and is not read: ImageNet's, and GPT-2's vocabulary and one more for the end of a file.
_IMAGES = data_lib.Shapes(1_281_167, (224, 224, 3), 1000)
_VOCABULARY = 50_258
_BYTES = text.END + 1
_SEQUENCES = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)  # what is computed of one is kept by which it is
class Network:
    """One training run, as far as its cost goes."""

    config: config_lib.Config
    counts: Counts  # of one example, on an accelerator
    state: dict[str, int]  # bytes of each part, on one device
    rule: Rule | None  # None: dense
    layers: list[Layer]  # that are trained sparse (in the dense twin: that would be)
    steps: int
    examples: int  # of an epoch
    update_every: int
    dense_gradients: float  # part of the steps with dense gradients
    assumed: tuple[str, ...]  # what was taken for granted, a sentence each

    @property
    def unit(self) -> str:
        """What is counted to tell a throughput."""
        return 'tokens' if self.length > 1 else 'images'

    @property
    def is_transformer(self) -> bool:
        """Whether it is a Transformer, whose products are split in pairs, and whose layers may be computed twice."""
        return self.config.model.name == 'transformer'

    @property
    def by_lanes(self) -> bool:
        """Whether a CPU has its images by lanes, where normalisation is read and written with the convolutions."""
        return self.config.model.layout != 'channels' and models.takes_lanes(self.config.model.name)

    @property
    def length(self) -> int:
        """Units of an example."""
        return self.config.data.length if self.config.data.name in ('text', 'stdlib') else 1

    @property
    def density(self) -> float:
        """Of the sparse layers, over all of the training; 1 of a dense one."""
        return 1.0 if self.rule is None else float(np.mean(self.rule.densities()))

    @property
    def block(self) -> int:
        """The smaller side of the blocks; 0: single weights."""
        if self.rule is None or not isinstance(self.rule.granularity, Block):
            return 0
        return min(self.rule.granularity.sides)

    def with_blocks(self, side: int) -> 'Network | None':
        """The same network, sparse by square blocks; None where it is dense, or its method or a layer does not take them."""
        if self.rule is None:
            return None
        try:
            rule = dataclasses.replace(self.rule, granularity=Block(side, side))
            leaf_densities(rule, self.layers, self.density)
        except ValueError:
            return None
        return dataclasses.replace(self, rule=rule)

    def densities(self, density: float | None = None) -> dict[str, float]:
        """Density of each sparse leaf; of all sparse layers together it is as given."""
        if self.rule is None or density == 1:
            return {}
        return leaf_densities(self.rule, self.layers, self.density if density is None else density)


def leaf_densities(rule: Rule, layers: list[Layer], density: float) -> dict[str, float]:
    """Density of each sparse leaf, as a rule shares weights out."""
    units = rule.counts(layers, density)
    found = {}
    for layer in layers:
        rows = units[layer.start : layer.stop]
        size = rule.granularity.num_units(layer.shape) * len(rows)
        found[layer.name] = sum(rows) / size
    return found


def of_config(config: config_lib.Config, outputs: int | None = None) -> Network:
    """What a config would train.

    Args:
      config: the settings.
      outputs: classes or tokens of data that is not read; None: what is usual.

    Returns:
      Its network.

    Raises:
      ValueError: for anything wrong with the settings.
    """
    shapes, assumed = _shapes(config, outputs)
    # The plan is of the program that an accelerator gets, with one sparse kernel for all; compact storage has counts of its own in `state`.
    plain = dataclasses.replace(config.sparsity, storage='dense', kernels='dense', groups=1)
    dense_storage = dataclasses.replace(config, sparsity=plain)
    config_lib.validate(config)
    run_lib.check_names(config)
    made: dict[str, Any] = dict(num_examples=shapes.num_train, input_shape=shapes.input_shape, num_outputs=shapes.num_outputs)
    experiment = experiment_lib.build(config, **made)
    model = experiment_lib.model_of(dense_storage, shapes.input_shape, shapes.num_outputs)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    rule = None
    if config.sparsity.method != 'dense':
        steps = config.train.schedule_steps or experiment.total_steps
        rule = experiment_lib.rule_of(config, model.stacked, experiment.update_every // config.sparsity.groups, steps)

    def logits(params, inputs):
        constants = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        return model.apply(params, constants, inputs, train=True, rng=jax.random.key(0))[0]

    with kernels.lowering_for('tpu'):  # convolutions as such, and attention in its plainest form
        counts = counts_lib.count(logits, params, experiment.example)
    updates = rule is not None and not rule.is_fixed
    dense = experiment.dense_gradient_steps
    return Network(
        config=config,
        counts=counts,
        state=memory_table.parts(experiment, config.sparsity.groups),
        rule=rule,
        layers=experiment.layers,
        steps=experiment.total_steps - experiment.start_step,
        examples=shapes.num_train,
        update_every=experiment.update_every if updates else 0,
        dense_gradients=1.0 if dense is None else min(1.0, dense / experiment.update_every) if updates else 0.0,
        assumed=tuple(assumed),
    )


def _shapes(config: config_lib.Config, outputs: int | None) -> tuple[data_lib.Shapes, list[str]]:
    """Shapes of a config's data, which is not read, and what was assumed of them."""
    known = data_lib.known_shapes(config.data.name)
    held_out = lambda count: count - round(config.data.validation * count)
    if known is not None:
        if outputs is not None:
            raise ValueError(f'--vocabulary={outputs} has no meaning with config.data.name={config.data.name!r}: leave it out.')
        return known._replace(num_train=held_out(known.num_train)), []
    if config.data.name in ('text', 'stdlib'):
        is_bytes = config.data.name == 'stdlib' and not config.data.tokenizer
        if is_bytes and outputs is not None:
            raise ValueError(
                f"--vocabulary={outputs} has no meaning with config.data.name='stdlib', whose tokens are bytes: leave it out."
            )
        assumed = [] if outputs or is_bytes else [f'The vocabulary is taken to have {_VOCABULARY:,} tokens (--vocabulary).']
        if not config.train.steps:
            assumed.append(f'An epoch is taken to have {_SEQUENCES:,} sequences (config.train.steps gives a length).')
        return data_lib.Shapes(_SEQUENCES, (config.data.length,), _BYTES if is_bytes else outputs or _VOCABULARY), assumed
    side = config.data.size or _IMAGES.input_shape[0]
    classes = outputs or _IMAGES.num_outputs
    sentence = f'The data is taken to have {_IMAGES.num_train:,} images of {side}x{side} pixels in {classes:,} classes (config.data.size, --vocabulary).'
    return data_lib.Shapes(held_out(_IMAGES.num_train), (side, side, 3), classes), [sentence]
