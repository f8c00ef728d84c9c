"""The figures of benchmarks.reliability that are measured in one process of eight devices: elastic, selection and corruption.

    python -m benchmarks.reliability.inside FIGURE COUNT FOLDER

It prints the results as JSON; benchmarks/reliability/figures.py starts it.
"""

import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import sharding, train
from sparse_jax.aot import collectives
from sparse_jax.runtime import checkpoint
from sparse_jax.train import devices as devices_lib


def bits(tree: Any) -> list[bytes]:
    """Returns the bytes of each array of a tree."""
    unwrap = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(unwrap(x)).tobytes() for x in jax.tree.leaves(tree)]


def _save(folder: pathlib.Path, state: Any, steps=(1,)) -> pathlib.Path:
    """Saves a state as the checkpoint of each of some steps; returns the folder."""
    checkpoints = checkpoint.Checkpoints(folder, keep=len(steps))
    for step in steps:
        checkpoints.save(step, state, 0.0)
    checkpoints.close()
    return folder


def elastic(counts: int, folder: pathlib.Path) -> dict[str, Any]:
    """Restores a Transformer saved on 4 x 2 devices on each mesh, saves it there, and restores it on 4 x 2 again.

    After each restore it compares the state's fingerprint, and the masks of an update from the same gradients.
    """
    del counts

    def make(data, model):
        config = config_lib.Config()
        config.model.name, config.model.depth, config.model.features, config.model.heads = 'transformer', 2, 128, 8
        config.data.name, config.data.batch_size, config.mesh.layout = 'stdlib', 16, 'model+fsdp'
        config.sparsity.update_every, config.train.steps, config.mesh.data, config.mesh.model = 1, 10, data, model
        experiment = train.create(config, num_examples=160, input_shape=(16,), num_outputs=256)
        return experiment, devices_lib.Devices(config, experiment)

    experiment, devices = make(4, 2)
    state = devices.jit(experiment.init, devices.state_shardings)(jax.random.key(0))
    tx = sj.sparse_momentum(0.1, density=0.2, update_every=1, total_steps=10, stacked=experiment.stacked)

    def next_masks(state):
        """Returns the bits of the masks after an update from rolled parameters as gradients."""

        @jax.jit
        def updated_masks(params, opt_state):
            grads = jax.tree.map(lambda x: jnp.roll(x, 1), params)
            return sj.get_masks(tx.update(grads, opt_state, params)[1])

        return bits(updated_masks(state.params, tx.init(state.params)))

    expected, masks, first = checkpoint.fingerprint(state), next_masks(state), _save(folder / 'first', state)
    results = {'restores': 0, 'fingerprints': 0, 'masks': 0}
    for mesh in ((2, 4), (8, 1), (1, 8), (1, 1)):
        source = first
        for turn in (mesh, (4, 2)):
            _, devices = make(*turn)
            checkpoints = checkpoint.Checkpoints(source)
            state, _ = checkpoints.restore(1, devices.shapes)
            checkpoints.close()
            results['restores'] += 1
            results['fingerprints'] += checkpoint.fingerprint(state) == expected
            results['masks'] += next_masks(state) == masks
            source = _save(folder / f'{mesh}', state) if turn == mesh else source
    return results


SPECS = (
    P('data', 'model'), P('model', 'data'), P(None, 'model'), P('model', None),
    P('data', None), P(None, 'data'), P(('data', 'model'), None), P(None, ('data', 'model')),
)  # fmt: skip


def selection(counts: int, folder: pathlib.Path) -> dict[str, Any]:
    """Updates the masks of twelve matrices and convolutions, sharded by each of eight specs, and compares with one device."""
    del folder
    shapes = {f'{i}': shape for i, shape in enumerate([(256, 512), (512, 256), (3, 3, 64, 128), (1, 1, 128, 64)] * 3)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    tx = sj.sparsify(optax.sgd(0.1, 0.9), density=0.1, update_every=1, total_steps=100)
    state: Any = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    grads = jax.tree.map(lambda p: jnp.round(4 * jnp.roll(p, 7)), params)
    update = jax.jit(tx.update)
    expected, mesh = bits(update(grads, state, params)), sharding.make_mesh(4, 2)
    results: dict[str, Any] = {'cases': 0, 'equal': 0, 'gathers': 0, 'bytes': 0.0, 'layers': len(shapes)}
    for spec in SPECS[:counts]:
        shard = lambda x, spec=spec: NamedSharding(
            mesh, P(*[None] * (x.ndim - 2), *spec) if x.ndim >= 2 and x.dtype != jnp.int32 else P()
        )
        operands = jax.tree.map(lambda x, shard=shard: jax.device_put(x, shard(x)), (grads, state, params))
        compiled = update.lower(*operands).compile()
        results['cases'] += 1
        results['equal'] += bits(compiled(*operands)) == expected
        communication = collectives.find(compiled.as_text() or '')
        results['gathers'] += sum(c.kind != 'all-reduce' for c in communication)
        axes = len({axis for part in spec if part for axis in (part if isinstance(part, tuple) else (part,))})
        for loop in {c.loop for c in communication if c.loop}:
            loop_bytes = sum(c.bytes for c in communication if c.loop == loop)
            results['bytes'] = max(results['bytes'], loop_bytes / len(shapes) / axes)
    return results


def corruption(counts: int, folder: pathlib.Path) -> dict[str, Any]:
    """Flips a random bit in each file of a checkpoint in turn; compares what we restore, and what orbax alone restores."""
    tree = {
        'w': jax.random.normal(jax.random.key(0), (200, 100)),
        'mask': jax.random.bernoulli(jax.random.key(1), 0.1, (200, 100)),
        'step': jnp.int32(7),
    }
    expected, saved = bits(tree), _save(folder / 'saved', tree, (1, 2))
    files = sorted(p.relative_to(saved) for p in (saved / '2').rglob('*') if p.is_file() and p.stat().st_size)
    random = np.random.default_rng(0)
    results = {'flips': 0, 'silent': 0, 'fell_back': 0, 'refused': 0, 'harmless': 0, 'orbax': 0}
    for number in range(counts):
        name, copy = files[number % len(files)], folder / str(number)
        shutil.copytree(saved, copy)
        content = bytearray((copy / name).read_bytes())
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        assert content != (saved / name).read_bytes(), 'nothing was flipped'
        (copy / name).write_bytes(content)
        results['flips'] += 1
        try:
            by_orbax = ocp.StandardCheckpointer().restore((copy / '2' / 'state').absolute())
            packed = jax.tree.map(lambda x: jnp.packbits(x, axis=-1) if x.dtype == bool else x, tree)
            results['orbax'] += bits(by_orbax) != bits(packed)
        except Exception:  # orbax noticed
            pass
        checkpoints = checkpoint.Checkpoints(copy)
        try:
            restored = checkpoints.restore_newest(jax.eval_shape(lambda: tree))
            assert restored is not None
            step, state, _ = restored
            results['fell_back' if step == 1 else 'harmless'] += bits(state) == expected
            results['silent'] += bits(state) != expected
        except ValueError:
            results['refused'] += 1
        finally:
            checkpoints.close()
        shutil.rmtree(copy)
    return results


if __name__ == '__main__':
    name, counts, folder = sys.argv[1:]
    print(
        json.dumps({'elastic': elastic, 'selection': selection, 'corruption': corruption}[name](int(counts), pathlib.Path(folder)))
    )
