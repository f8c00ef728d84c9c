"""Seven figures of reliability, measured with real processes, kills, signals and files.

    python -m benchmarks.reliability                     # all figures: forty minutes on two cores
    python -m benchmarks.reliability --reduced           # smaller counts: seven minutes
    python -m benchmarks.reliability --figure=kills,sigterm

The figures keep their numbers in docs/distributed.md: 1 kills, 3 determinism, 5 elastic, 6 selection, 9 corruption, 12 sigterm, 13
peers. Unless stated otherwise they train LeNet-300-100 on the offline digits with two processes over gloo. Each checks that its fault
really happened. The command prints a table, writes runs/reliability/figures.json, and exits with 1 if a figure missed its bar (with
--reduced, a missed time alone is tolerated).
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path('runs/reliability')
SHORT = (
    '--config=configs/mnist_lenet300.py:offline', '--config.sparsity.kernels=dense', '--config.log.every=10',
    '--config.sparsity.dense_gradient_window=None',  # one program to compile, not two
)  # fmt: skip
HEARTBEAT = 10


class Figure(NamedTuple):
    """A row of the printed table."""

    number: int
    what: str
    bar: str
    measured: str
    reached: bool
    but_slow: bool = False  # whether everything but a time reached its bar; a busy machine may be slow


# Runs


class Run:
    """A run of launch.py on some processes of this machine; as a context manager it kills those that are left at the end.

    Args:
      folder: workdir of the run; stderr of process i goes to the file FOLDER.i.log beside it.
      *flags: further flags of launch.py.
      processes: number of processes.
      devices: number of virtual devices of each process.
      cores: number of CPU cores that the processes share; 0 does not limit them.
      wrapper: arguments of Python that run launch.py, in place of the file itself.
      environment: environment variables to set.
    """

    def __init__(
        self, folder: pathlib.Path, *flags: str, processes: int = 2, devices: int = 2, cores: int = 0, wrapper: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ):  # fmt: skip
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        variables = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)} | (environment or {})
        self.processes = []
        for i in range(processes):
            distributed = [
                '--distributed', f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}',
                f'--heartbeat_timeout={HEARTBEAT}',
            ] if processes > 1 else []  # fmt: skip
            command = [sys.executable, *(wrapper or ('launch.py',)), *SHORT, f'--workdir={folder}', *distributed, *flags]
            if cores:
                command = ['taskset', '-c', f'0-{cores - 1}', *command]
            with open(f'{folder}.{i}.log', 'a') as log:
                options: dict[str, Any] = dict(cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=log)
                self.processes.append(subprocess.Popen(command, **options))

    def __enter__(self) -> 'Run':
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout: float = 300) -> list[int]:
        """Waits for all processes to end; returns their exit codes."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def until(self, step: int) -> None:
        """Waits until the metrics of a step are written; fails if a process ends before."""
        self._until(lambda: last_step(self.folder) >= step, f'step {step}')

    def until_committed(self) -> None:
        """Waits until a checkpoint is committed; fails if a process ends before."""
        self._until(lambda: committed(self.folder), 'a commit')

    def _until(self, reached: Callable[[], bool], event: str) -> None:
        begin = time.monotonic()
        while not reached():
            if time.monotonic() > begin + 180 or any(process.poll() is not None for process in self.processes):
                raise SystemExit(f'error: the run in {self.folder} ended before {event}: see {self.folder}.*.log')
            time.sleep(0.005)

    def said(self, i: int) -> str:
        """Returns what process i wrote to stderr."""
        return pathlib.Path(f'{self.folder}.{i}.log').read_text()


def last_step(folder: pathlib.Path) -> int:
    """Returns the last step whose metrics are written, or -1."""
    path = folder / 'metrics.jsonl'
    lines = path.read_text().split('\n') if path.exists() else []
    return json.loads(lines[-2])['step'] if len(lines) > 1 else -1


def committed(folder: pathlib.Path) -> bool:
    """Tells whether a checkpoint is complete: orbax renames its folder to the step's number as the last act of saving it."""
    return any(path.name.isdigit() for path in (folder / 'checkpoints').glob('*'))


def digest(folder: pathlib.Path) -> str:
    """Returns the fingerprint of all arrays at a run's end."""
    steps = json.loads((folder / 'result.json').read_text())['steps']
    return json.loads((folder / 'checkpoints' / str(steps) / 'meta' / 'metadata').read_text())['fingerprint']


def done(run: Run) -> None:
    """Waits for a run to end and requires that all its processes succeeded."""
    codes = run.wait()
    if any(codes):
        raise SystemExit(f'error: exit codes {codes} in {run.folder}: see {run.folder}.*.log')


# The figures


def kills(counts: int, random_: random.Random) -> Figure:
    """Kills one or both of two processes at random times, up to five times per run, and compares the bits at the end.

    Three in four kills wait for a first commit; the others come at any time. By chance alone all of a few kills might precede it.
    """
    flags = (
        '--config.train.steps=1000',
        '--config.checkpoint.every=100',
        '--config.mesh.data=2',
        '--config.mesh.model=2',
        '--config.mesh.layout=model',
    )
    with Run(FOLDER / 'kills/undisturbed', *flags) as run:
        done(run)
    expected, equal, killed, after_commit, trial = digest(run.folder), 0, 0, 0, 0
    while killed < counts:
        folder, kills_of_run = FOLDER / f'kills/{trial}', 0
        for _ in range(min(5, counts - killed)):
            with Run(folder, *flags) as run:
                if (killed + kills_of_run) % 4:
                    run.until_committed()
                before = max(last_step(folder), 0)
                run.until(min(before + random_.randrange(10, 200, 10), 900))
                time.sleep(random_.random() * 0.3)
                victims = random_.choice(([0], [1], [0, 1]))
                if (folder / 'result.json').exists():
                    raise SystemExit(f'error: {folder} ended before it could be killed')
                for i in victims:
                    run.processes[i].kill()
                codes = run.wait(HEARTBEAT + 60)
                assert all(codes[i] == -signal.SIGKILL for i in victims), codes
            kills_of_run += 1
            after_commit += committed(folder)
        with Run(folder, *flags) as run:
            done(run)
        killed += kills_of_run
        equal += kills_of_run * (digest(folder) == expected)
        trial += 1
    bar = f'{killed}/{killed} equal, {3 * killed // 4} of them after a commit'
    measured = f'{equal}/{killed} equal, {after_commit} after a commit'
    return Figure(
        1,
        'kill -9 of one or both of two processes: bits of the end',
        bar,
        measured,
        equal == killed and after_commit >= 3 * killed // 4,
    )


def determinism(counts: int, random_: random.Random) -> Figure:
    """Runs each kind of command twice and compares the bits at the end."""
    kinds = [(dtype, processes, cores) for dtype in ('float32', 'bfloat16') for processes in (1, 2) for cores in (1, 2)]
    kinds = kinds[:counts] if counts >= len(kinds) else [('float32', 2, 2), ('float32', 1, 1)][:counts]
    same, across_cores = 0, {}
    for dtype, processes, cores in kinds:
        digests = []
        for turn in range(2):
            folder = FOLDER / f'determinism/{dtype}_{processes}_{cores}_{turn}'
            flags = (
                '--config.train.steps=200',
                f'--config.model.dtype={dtype}',
                '--config.mesh.model=2',
                '--config.mesh.layout=model+fsdp',
            )
            with Run(folder, *flags, processes=processes, devices=4 // processes, cores=cores) as run:
                done(run)
            digests.append(digest(folder))
        same += digests[0] == digests[1]
        across_cores.setdefault((dtype, processes), set()).add(digests[0])
    cores_alike = all(len(distinct) == 1 for distinct in across_cores.values())
    measured = f'{same}/{len(kinds)}' + (f', one and two cores {"equal" if cores_alike else "differ"}' if len(kinds) > 2 else '')
    return Figure(
        3, 'two runs of one command: bits of the end', f'{len(kinds)}/{len(kinds)}', measured, same == len(kinds) and cores_alike
    )


def _inside(name: str, counts: int) -> dict[str, Any]:
    """Runs a function of inside.py in one process of eight devices and returns its results."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'}
    command = [sys.executable, '-m', 'benchmarks.reliability.inside', name, str(counts), str(FOLDER / name)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f'error: {name} failed:\n{process.stderr[-2000:]}')
    return json.loads(process.stdout.splitlines()[-1])


def elastic(counts: int, random_: random.Random) -> Figure:
    """Restores a sharded checkpoint on other meshes and compares fingerprints and the next mask update."""
    results = _inside('elastic', counts)
    restores = results['restores']
    measured = f'fingerprints {results["fingerprints"]}/{restores}, masks of the next update {results["masks"]}/{restores}'
    reached = results['fingerprints'] == results['masks'] == restores
    return Figure(5, 'saved on 4x2 devices, restored on 2x4, 8x1, 1x8, 1x1 and back', 'all equal', measured, reached)


def selection(counts: int, random_: random.Random) -> Figure:
    """Compares a sharded mask update with one device's, and counts what it communicates."""
    results = _inside('selection', counts)
    measured = (
        f'{results["equal"]}/{results["cases"]} equal, {results["gathers"]} all-gathers, at most {results["bytes"]:.0f} bytes'
    )
    reached = results['equal'] == results['cases'] and not results['gathers'] and results['bytes'] <= 64
    bar = 'all equal, no all-gather, 64 bytes a layer and axis in a round'
    return Figure(
        6, f'a mask update of {results["layers"]} layers on 4x2 devices, 8 layouts, against one device', bar, measured, reached
    )


def corruption(counts: int, random_: random.Random) -> Figure:
    """Flips bits in the files of a checkpoint and counts the restores that silently returned something else."""
    results = _inside('corruption', counts)
    outcomes = f'{results["fell_back"]} fell back a step, {results["refused"]} refused, {results["harmless"]} changed nothing'
    measured = f'{results["silent"]} of {results["flips"]} silent ({outcomes}); orbax alone {results["orbax"]}'
    return Figure(9, 'a bit flipped in a checkpoint, in every file in turn', '0 silent', measured, results['silent'] == 0)


def sigterm(counts: int, random_: random.Random) -> Figure:
    """Sends SIGTERM to one of two processes, or to a single one, at random times; frequent evaluations and updates are often hit."""
    flags = (
        '--config.train.steps=4000',
        '--config.train.eval_every=7',
        '--config.sparsity.update_every=5',
        '--config.checkpoint.every=100000',
    )
    good, times = 0, []
    for trial in range(counts):
        processes = 2 - trial % 2
        mesh = ('--config.mesh.data=2', '--config.mesh.model=2', '--config.mesh.layout=model')
        with Run(FOLDER / f'sigterm/{trial}', *flags, *mesh, processes=processes, devices=4 // processes) as run:
            run.until(30)
            time.sleep(random_.random() * 0.5)
            begin = time.monotonic()
            run.processes[random_.randrange(processes)].send_signal(signal.SIGTERM)
            codes = run.wait(60)
            times.append(time.monotonic() - begin)
        messages = [line for i in range(processes) for line in run.said(i).splitlines() if 'stopped by SIGTERM after step' in line]
        steps = {int(line.split('after step ')[1].split(',')[0]) for line in messages}
        saved = {int(p.name) for p in (run.folder / 'checkpoints').glob('*') if p.name.isdigit()}
        good += codes == [75] * processes and len(messages) == processes and saved == steps and len(steps) == 1
    measured = f'{good}/{counts} so, within {max(times):.1f} s'
    bar = 'all save the step they stop at, exit with 75, within 5 s'
    return Figure(
        12, 'SIGTERM to one of two processes, or to one alone', bar, measured, good == counts and max(times) <= 5, good == counts
    )


# A process whose interpreter hangs still sends heartbeats, from C++ threads. What ends its peers is the timeout of collectives, which is
# half an hour by XLA's default.
TIMEOUT = f'--xla_cpu_collective_timeout_seconds={HEARTBEAT}'

# Process 1 never releases its interpreter's lock once a file exists: its Python code stands still while its C++ threads go on.
LOCKING = """
import ctypes, os, runpy, sys, threading, time
def lock():
    while not os.path.exists(os.environ['LOCK']): time.sleep(0.01)
    ctypes.PyDLL(None).sleep(1000)
if '--process_id=1' in sys.argv: threading.Thread(target=lock, daemon=True).start()
sys.argv = sys.argv[sys.argv.index('launch.py'):]
runpy.run_path('launch.py', run_name='__main__')
"""


def peers(counts: int, random_: random.Random) -> Figure:
    """Kills, stops or hangs one process and measures how long the other one goes on."""
    kinds = ('SIGKILL', 'SIGKILL, two devices each', 'SIGSTOP', 'a hung interpreter')
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    orphans = 0
    for trial in range(counts):
        kind = kinds[trial % 4]
        folder = FOLDER / f'peers/{trial}'
        lock, hangs = (ROOT / folder).with_suffix('.hang'), kind == 'a hung interpreter'
        environment = {'LOCK': str(lock), 'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {TIMEOUT}'} if hangs else None
        wrapper = ('-c', LOCKING, 'launch.py') if hangs else ()
        devices = 2 if 'two devices' in kind else 1
        with Run(folder, '--config.train.steps=100000', devices=devices, wrapper=wrapper, environment=environment) as run:
            run.until(100)  # everything is compiled by then
            if kind.startswith('SIGKILL'):
                run.processes[1].kill()
            elif kind == 'SIGSTOP':
                run.processes[1].send_signal(signal.SIGSTOP)
            else:
                lock.touch()
            begin = time.monotonic()
            try:
                run.processes[0].wait(HEARTBEAT + 50)
                times[kind].append(time.monotonic() - begin)
            except subprocess.TimeoutExpired:
                times[kind].append(float('inf'))
            if kind == 'SIGSTOP':
                assert run.processes[1].poll() is None, 'it was not stopped'
        orphans += any(process.poll() is None for process in run.processes)
    measured = '; '.join(f'{kind} {max(t):.1f} s' for kind, t in times.items() if t)
    reached = all(max(t) <= (1.0 if kind == 'SIGKILL' else HEARTBEAT + 2) for kind, t in times.items() if t) and not orphans
    bar = f'SIGKILL 1 s where each has one device; else the heartbeat of {HEARTBEAT} s and 2 s more (hung: with `{TIMEOUT}`)'
    all_ended = not orphans and all(x < float('inf') for t in times.values() for x in t)
    return Figure(13, 'a process dead or hung: the other one has ended', bar, measured, reached, but_slow=all_ended)


FIGURES: dict[str, tuple[Callable[[int, random.Random], Figure], int, int]] = {  # function, full count, reduced count
    'kills': (kills, 20, 2),
    'determinism': (determinism, 8, 1),
    'elastic': (elastic, 1, 1),
    'selection': (selection, 8, 2),
    'corruption': (corruption, 100, 40),
    'sigterm': (sigterm, 8, 2),
    'peers': (peers, 8, 3),
}


def _rows(figures: list[Figure]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield '| # | figure | bar | measured | |'
    yield '|---:|---|---|---|---|'
    for f in sorted(figures):
        yield f'| {f.number} | {f.what} | {f.bar} | {f.measured} | {"reached" if f.reached else "**not reached**"} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--figure', default=','.join(FIGURES), help='which figures to measure, separated by commas')
    parser.add_argument('--reduced', action='store_true', help='measure with smaller counts')
    parser.add_argument('--seed', type=int, default=None, help='seed of the times of kills; by default a new one, which is printed')
    args = parser.parse_args()
    names = args.figure.split(',')
    if unknown := [name for name in names if name not in FIGURES]:
        raise SystemExit(f'error: --figure={unknown[0]} does not exist: {", ".join(FIGURES)}.')
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f'--seed={seed}')
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    figures = []
    for name in names:
        function, count, reduced = FIGURES[name]
        begin = time.monotonic()
        figures.append(function(reduced if args.reduced else count, random.Random(f'{seed} {name}')))
        print(f'{name}: {figures[-1].measured} ({time.monotonic() - begin:.0f} s)', flush=True)
    (FOLDER / 'figures.json').write_text(json.dumps([f._asdict() for f in figures], indent=2) + '\n')
    print('\n'.join(_rows(figures)))
    sys.exit(0 if all(f.reached or (args.reduced and f.but_slow) for f in figures) else 1)
