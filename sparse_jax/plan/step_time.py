r"""How long a training step takes on a device: each product the larger of its arithmetic and its traffic, then what stands around the products.

A product of N multiply-adds that moves b bytes takes :math:`\max(2 N / (e_p F),\, b / (e_b B))` seconds: a part of the peak F, a part of the
bandwidth B. What runs between products, the optimizer and mask updates are traffic alone. Communication is hidden as far as there is
something to hide it behind. The parts e are of a device, and were fitted on rows that the documentation names.
"""

import dataclasses
import functools
from typing import NamedTuple

from sparse_jax.plan import collectives, sparse_time
from sparse_jax.plan.collectives import Mesh, Traffic
from sparse_jax.plan.counts import Product
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.network import Network

_TILE, _DEPTH = 128, 32  # outputs and inputs of a tile that a tensor core's kernel works on
_BESIDE = 3  # kernels for each product, itself included
_VECTOR = 16  # numbers of a CPU's vector
BYTES = {'float32': 4, 'bfloat16': 2}
# What the optimizer reads and writes for each weight, float32 all: gradient, weight and moments; and once more to clip gradients.
_OPTIMIZER_BYTES, _CLIP_BYTES = {'sgd': 20, 'adamw': 28}, 4
_MASK_BYTES = 3  # a mask is read by gradients, weights and their product
_MASK_UPDATE_BYTES = 160  # of each weight, in the step of an update: some 40 passes over its key
_ADDED = 'attention/out/kernel', 'mlp/down/kernel'  # whose results model parallelism adds
_SCORES_PASSES = 6  # over attention's scores, written in float32, where no kernel keeps them on the chip


class Choice(NamedTuple):
    """How a network is trained on a number of devices, beside its config."""

    mesh: Mesh
    accumulate: int = 1  # parts of a batch, one after the other
    remat: bool = False  # whether layers are computed twice to keep less
    fused_attention: bool | None = None  # whether a kernel keeps attention's scores on the chip; None: models.attention decides

    def writes_scores(self, device: Device, dtype: str) -> bool:
        """Whether attention's scores are written to memory: by XLA, where no kernel takes the type or the device has none."""
        has_kernel = device.title.startswith('NVIDIA') and dtype == 'bfloat16'
        return not (has_kernel if self.fused_attention is None else self.fused_attention)

    def keeps_scores(self, device: Device) -> bool:
        """Whether they stay there for the backward pass; on GPUs they are computed again."""
        return not (device.kind == 'gpu' if self.fused_attention is None else self.fused_attention)


@dataclasses.dataclass(frozen=True)
class Step:
    """The parts of a step in seconds, on each device."""

    arithmetic: float  # of products that the units for products limit
    traffic: float  # of products that the memory limits
    between: float  # what runs between products
    optimizer: float
    masks: float  # mask updates, averaged over the steps
    launches: float
    communication: float  # that nothing hides
    hidden: float  # the communication that is, which takes no time
    sent: Traffic
    backward: float  # what gradients may hide behind

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by name, in the order in which they are shown."""
        names = 'arithmetic', 'traffic', 'between', 'optimizer', 'masks', 'launches', 'communication'
        return {name: getattr(self, name) for name in names}

    def limits(self) -> dict[str, float]:
        """The share of the step that each property of the hardware limits.

        Where it fits at all, tensor cores come first, then bandwidth, then links; what is left is the host's and small kernels' time.
        """
        memory = self.traffic + self.between + self.optimizer + self.masks
        rows = {
            'units for products': self.arithmetic,
            'memory bandwidth': memory,
            'links': self.communication,
            'launches': self.launches,
        }
        return {name: seconds / self.seconds for name, seconds in rows.items()}


def step(network: Network, device: Device, choice: Choice, density: float | None = None) -> Step:
    """The time of an average training step on each of a mesh's devices.

    Args:
      network: what is trained.
      device: of which the mesh consists.
      choice: mesh, accumulation and what is computed twice.
      density: of the sparse layers together; None: the config's; 1: the dense network.

    Returns:
      Its parts, in seconds.
    """
    densities = network.densities(density)
    config, mesh = network.config, choice.mesh
    examples = config.data.batch_size / mesh.data
    arithmetic, traffic, launched = _products(network, device, examples, mesh.model, choice.remat, density)
    products = arithmetic + traffic
    stored = _stored(network, densities) / mesh.model / (mesh.data if mesh.sharded else 1)
    optimizer = _OPTIMIZER_BYTES[config.optimizer.name] + _CLIP_BYTES * (config.optimizer.clip_norm > 0)
    optimizer += 8 * (choice.accumulate - 1)  # sums of gradients are read and written
    sparse = sum(_size(network.counts.leaves[name]) for name in densities) / mesh.model / (mesh.data if mesh.sharded else 1)
    reached = device.efficiency['bandwidth'] * device.bandwidth
    sent = _traffic(network, device, choice, densities)
    backward = products * 2 / 3
    hidden = min(sent.seconds_gradients, device.efficiency['overlap'] * backward / (1 if mesh.sharded else choice.accumulate))
    hidden += min(sent.seconds_weights, max(0.0, device.efficiency['overlap'] * products - hidden))  # nothing hides two things
    return Step(
        arithmetic=arithmetic,
        traffic=traffic,
        between=_between(network, device, choice, examples / mesh.model) / reached,
        optimizer=(optimizer * stored + _MASK_BYTES * sparse * (config.sparsity.storage == 'dense'))
        / reached
        / device.efficiency['optimizer'],
        masks=_MASK_UPDATE_BYTES * sparse / reached / network.update_every if network.update_every else 0.0,
        launches=1e-6 * device.efficiency['launch_us'] * choice.accumulate * (_BESIDE * launched + 2 * len(network.counts.leaves)),
        communication=sent.seconds - hidden,
        hidden=hidden,
        sent=sent,
        backward=backward,
    )


def _utilization(side: int, tile: int) -> float:
    """The part of whole tiles that a side fills."""
    return side / (-(-side // tile) * tile)


def parts_of(product: Product, parts: int) -> int:
    """Over how many devices a product is divided: of that many, or not at all where its outputs do not divide."""
    return parts if not product.name or product.outputs % parts == 0 else 1


def dense_seconds(product: Product, examples: float, device: Device, dtype: str, parts: int = 1) -> tuple[float, float]:
    """Seconds of one pass of a dense product.

    Args:
      product: of one example.
      examples: of a step, over the devices that share its layers.
      device: a kind of device.
      dtype: in which it computes.
      parts: devices that its outputs (of attention, its heads) are divided over.

    Returns:
      Those of its arithmetic, and of its traffic.
    """
    parts = parts_of(product, parts)
    outputs = -(-product.outputs // parts) if product.name else product.outputs
    reached = device.efficiency['convolutions' if product.kind == 'convolution' else 'products'] * device.efficiency['network']
    if device.kind != 'cpu':
        reached *= _utilization(outputs, _TILE) * _utilization(product.inputs, _DEPTH)
    elif product.geometry:  # vectors hold channels
        reached *= _utilization(outputs, _VECTOR) * _utilization(product.geometry[2], _VECTOR)
    moved = product.read + product.written / parts  # every device reads all inputs
    if not product.name:
        moved = (product.read + product.written) / parts
        if device.kind != 'cpu':  # one kernel: only its operands and its result are in memory
            moved = min(product.read, product.written) / parts
    bytes_ = BYTES[dtype] * (moved * examples + product.weights / parts)
    operations = 2 * product.operations * examples / parts
    return operations / (device.operations(dtype) * reached), bytes_ / (device.efficiency['bandwidth'] * device.bandwidth)


@functools.lru_cache(maxsize=4096)
def _products(
    network: Network, device: Device, examples: float, parts: int, remat: bool, density: float | None
) -> tuple[float, float, float]:
    """Seconds of all products that arithmetic limits, and of all that traffic limits; and the number of their kernels."""
    densities = network.densities(density)
    limited = moved = kernels = 0.0
    for product in network.counts.products:
        passes = ['forward'] * (1 + remat)
        if product.name:
            passes += ['weight_gradient'] + ['input_gradient'] * product.needs_input_gradient
        elif product.needs_input_gradient:
            passes += ['input_gradient'] * 2
        layers = product.times if product.name else max(1, network.config.model.depth)
        kernels += len(passes) * layers * (1.0 if product.name else 0.5)  # attention's two products are one kernel
        dense = dense_seconds(product, examples, device, network.config.model.dtype, parts)
        for name in passes:
            shared = examples / parts_of(product, parts)
            arithmetic, traffic = _pass_seconds(network, product, name, shared, device, densities.get(product.name, 1.0), dense)
            limited += arithmetic if arithmetic >= traffic else 0.0
            moved += traffic if arithmetic < traffic else 0.0
    return limited, moved, kernels


def _pass_seconds(
    network: Network, product: Product, name: str, examples: float, device: Device, density: float, dense: tuple[float, float]
) -> tuple[float, float]:
    """Seconds of one pass of a product, on the kernel that is faster."""
    if density == 1:
        return dense
    sparse = sparse_time.seconds(product, name, examples, device, density=density, block=network.block, dense=dense)
    if name != 'weight_gradient':
        return sparse
    part = network.dense_gradients  # of the steps
    return (1 - part) * sparse[0] + part * dense[0], (1 - part) * sparse[1] + part * dense[1]


def _between(network: Network, device: Device, choice: Choice, examples: float) -> float:
    """Bytes of what runs between the products: forward once, backward twice."""
    passes = 3 + choice.remat
    moved = network.counts.moved * BYTES[network.config.model.dtype] * passes
    if choice.writes_scores(device, network.config.model.dtype):
        moved += network.counts.scores * 4 * _SCORES_PASSES
    return moved * examples / device.efficiency['lanes' if network.by_lanes else 'between']


def _stored(network: Network, densities: dict[str, float]) -> float:
    """Weights that are stored."""
    counts = network.counts
    if network.config.sparsity.storage == 'dense':
        return counts.parameters
    return sum(_size(shape) * densities.get(name, 1.0) for name, shape in counts.leaves.items())


def _traffic(network: Network, device: Device, choice: Choice, densities: dict[str, float]) -> Traffic:
    """What a step sends."""
    mesh, counts = choice.mesh, network.counts
    weights = _stored(network, densities) / mesh.model
    gradients = 4 * weights  # they are summed in float32
    width = BYTES[network.config.model.dtype]
    over = functools.partial(collectives.seconds, device=device)
    activations = bytes_ = 0.0
    if mesh.model > 1:
        examples = width * network.config.data.batch_size / mesh.data
        named = [p for p in counts.products if p.name]
        if network.is_transformer:
            # Results of attention and of the MLP are added forward, and the gradients of the inputs of five products backward.
            results = examples * sum(p.written for p in named if p.name.endswith(_ADDED))
            passes = 1 + choice.remat + 5 / 2
            bytes_, activations = passes * collectives.ring(results, mesh.model), passes * over(results, mesh.model)
        else:
            # all are split by outputs, which are stacked forward; backward the inputs' gradients are added
            written = examples * sum(p.written for p in named)
            read = examples * sum(p.read for p in named if p.needs_input_gradient)
            bytes_ = collectives.gather(written, mesh.model) + collectives.ring(read, mesh.model)
            activations = over(written, mesh.model, whole=False) + over(read, mesh.model)
        activations += 2e-6 * device.efficiency['collective_us'] * sum(p.times for p in named)
    if mesh.sharded:
        gathers = (2 + choice.remat) * choice.accumulate
        gathered = width * weights
        return Traffic(
            reduce_gradients=choice.accumulate * collectives.gather(gradients, mesh.data),
            gather_weights=gathers * collectives.gather(gathered, mesh.data),
            activations=bytes_,
            seconds_gradients=choice.accumulate * over(gradients, mesh.data, whole=False, stride=mesh.model),
            seconds_weights=gathers * over(gathered, mesh.data, whole=False, stride=mesh.model),
            seconds_activations=activations,
        )
    return Traffic(
        reduce_gradients=collectives.ring(gradients, mesh.data),
        activations=bytes_,
        seconds_gradients=over(gradients, mesh.data, stride=mesh.model),
        seconds_activations=activations,
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
