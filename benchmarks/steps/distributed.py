"""The cost of many devices and hosts: a mask update's bytes and time, a checkpoint's pause, a restart, two processes against one.

    python -m benchmarks.steps.distributed

All of it runs on this machine's cores with virtual devices, which cannot show a speed-up, only what is communicated and the overhead.
Cost: six minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from benchmarks.reliability import figures
from benchmarks.steps import mask_update
from sparse_jax import sharding
from sparse_jax.aot import collectives
from sparse_jax.runtime import checkpoint

FOLDER = pathlib.Path('runs/distributed')


def _moved(compiled) -> tuple[int, int]:
    """Returns the bytes that a program's collectives move per device (loops counted as 32 rounds) and its number of all-gathers."""
    communication = collectives.find(compiled.as_text() or '')
    return sum(c.bytes * (32 if c.loop else 1) for c in communication), sum(c.kind == 'all-gather' for c in communication)


def update(rounds: int) -> dict[str, Any]:
    """Measures a mask update of ResNet-50's tree, sharded by model+fsdp on 4 x 2 devices: ours, and one that gathers its inputs first."""
    mesh = sharding.make_mesh(4, 2)
    params = {f'{name}/kernel': jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in mask_update.resnet50().items()}
    tx = sj.sparsify(optax.sgd(0.1, 0.9), density=0.05, update_every=1, total_steps=10)
    placed = sharding.placements(params, mesh, 'model+fsdp')
    shapes = params, jax.eval_shape(tx.init, params)
    shardings = tuple(sharding.shardings(tree, params, placed, mesh) for tree in shapes)
    replicated = NamedSharding(mesh, P())

    def ours(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def gathered(grads, params, state):
        gather = lambda tree: jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated), tree)
        return ours(*gather((grads, params, state)))

    make = jax.jit(lambda key: {name: jax.random.normal(key, p.shape) for name, p in params.items()}, out_shardings=shardings[0])
    init = jax.jit(tx.init, out_shardings=shardings[1])
    operands = make(jax.random.key(1)), make(jax.random.key(0)), init(make(jax.random.key(0)))
    row: dict[str, Any] = {}
    programs = {}
    for name, function in (('ours', ours), ('gathered', gathered)):
        programs[name] = jax.jit(function, out_shardings=shardings).lower(*operands).compile()
        moved, gathers = _moved(programs[name])
        row[name] = {'bytes': moved, 'gathers': gathers, 'seconds': []}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if turn:
                row[name]['seconds'].append(time.perf_counter() - begin)
    for name in programs:
        row[name]['seconds'] = statistics.median(row[name]['seconds'])
    return row


def pause(rounds: int) -> dict[str, Any]:
    """Measures how long saving 25 million weights with momenta and masks blocks the loop, and how long it takes in total."""
    shapes = mask_update.resnet50()
    keys = jax.random.split(jax.random.key(0), len(shapes))  # random, since constants compress to nothing
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    tx = sj.sparse_momentum(0.1, density=0.05, update_every=10**6, total_steps=10**7)
    state = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])(params)  # with momenta
    folder, row = FOLDER / 'pause', {'pause': [], 'all': [], 'fingerprint': []}
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    for number in range(rounds + 1):
        begin = time.perf_counter()
        checkpoint.fingerprint((params, state))
        fingerprint = time.perf_counter() - begin
        begin = time.perf_counter()
        checkpoints.save(number, (params, state), 0.0)
        waited = time.perf_counter() - begin
        checkpoints._manager.wait_until_finished()
        if number:
            row['pause'].append(waited)
            row['all'].append(time.perf_counter() - begin)
            row['fingerprint'].append(fingerprint)
    checkpoints.close()
    size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
    return {name: statistics.median(values) for name, values in row.items()} | {'bytes': size}


def restart() -> dict[str, float]:
    """Measures the seconds from the start of a LeNet-300-100 run to its first step, without and with a cache of compiled programs."""
    folder, row = FOLDER / 'restart', {}
    for name in ('cold', 'warm'):
        run = folder / name
        environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str((folder / 'cache').absolute()), 'JAX_PLATFORMS': 'cpu',
                                    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}  # fmt: skip
        environment.pop('JAX_NUM_CPU_DEVICES', None)
        command = [
            sys.executable,
            'launch.py',
            *figures.SHORT,
            f'--workdir={run}',
            '--config.log.every=1',
            '--config.train.steps=20',
        ]
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = run / 'metrics.jsonl'
        while process.poll() is None and not (path.exists() and '"loss"' in path.read_text()):
            time.sleep(0.01)
        row[name] = time.perf_counter() - begin
        process.wait()
    return row


def hosts(rounds: int) -> dict[str, Any]:
    """Measures steps per second of LeNet-300-100 on a mesh of 4 x 2, from one process of eight devices and from two of four."""
    row: dict[str, Any] = {'1x8': [], '2x4': []}
    flags = ('--config.train.steps=400', '--config.mesh.data=4', '--config.mesh.model=2', '--config.mesh.layout=model')
    for turn in range(rounds):
        for name, processes in (('1x8', 1), ('2x4', 2)):
            with figures.Run(FOLDER / f'hosts/{name}_{turn}', *flags, processes=processes, devices=8 // processes) as run:
                figures.done(run)
            rows = [json.loads(line) for line in (run.folder / 'metrics.jsonl').read_text().splitlines()]
            row[name].append(statistics.median(r['steps_per_second'] for r in rows if 'steps_per_second' in r))
    return {name: statistics.median(values) for name, values in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    jax.config.update('jax_num_cpu_devices', 8)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    u = update(args.rounds)
    print('| mask update of 25.5M weights on 4 x 2 devices | bytes moved | all-gathers | time |\n|---|---:|---:|---:|')
    for name in ('gathered', 'ours'):
        print(f'| {name} | {u[name]["bytes"]:,} | {u[name]["gathers"]} | {1e3 * u[name]["seconds"]:,.0f} ms |')
    ratio = u['gathered']['bytes'] / u['ours']['bytes'], u['gathered']['seconds'] / u['ours']['seconds']
    print(f'| gathered against ours | {ratio[0]:,.0f}x | | {ratio[1]:.1f}x |\n')
    p = pause(args.rounds)
    print('| saving 25.5M weights with momenta and masks | |\n|---|---:|')
    print(f'| the loop waits | {1e3 * p["pause"]:,.0f} ms |\n| of that the fingerprint | {1e3 * p["fingerprint"]:,.0f} ms |')
    print(f'| until all is written, in the background | {1e3 * p["all"]:,.0f} ms |\n| on disk | {p["bytes"] / 2**20:,.0f} MiB |\n')
    r, h = restart(), hosts(min(3, args.rounds))
    print('| | |\n|---|---:|')
    print(
        f'| start of the command to the first step, nothing compiled | {r["cold"]:.1f} s |\n| with a cache of compiled programs | {r["warm"]:.1f} s |'
    )
    print(f'| one process of eight devices | {h["1x8"]:.0f} steps/s |\n| two processes of four | {h["2x4"]:.0f} steps/s |')
    (FOLDER / 'distributed.json').write_text(json.dumps({'update': u, 'pause': p, 'restart': r, 'hosts': h}, indent=2) + '\n')


if __name__ == '__main__':
    main()
