"""Tries random input for some minutes; whatever is neither right nor told in a clear line fails, and is printed as a small program.

    make fuzz FLAGS='--minutes=60 --seed=7'
    python -m tests.fuzz --kinds=kernels --minutes=1     # of one kind only

Half of the time goes to arguments (settings of the launcher, optimizers, patterns and products), a quarter to finished runs whose
files are damaged, a quarter to products of extreme shape by the CPU kernels, which are compared with float64. The seed is printed: with it
the same programs come again.
"""

import argparse
import collections
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

from tests.fuzz import cases

ROOT = pathlib.Path(__file__).parents[2]
_LIMIT = 240  # seconds that one program may take
# Two processes at a time, each with its kinds and their shares.
_SHARES = ({'settings': 0.4, 'api': 0.4, 'calls': 0.2}, {'workdirs': 0.5, 'kernels': 0.5})


class Failure(NamedTuple):
    """A program that did not end as it may."""

    kind: str
    number: int
    program: str
    reason: str


class Outcomes:
    """What became of all programs."""

    def __init__(self):
        self.counts: dict[str, collections.Counter] = {}
        self.failures: list[Failure] = []

    def add(self, kind: str, number: int, program: str, outcome: str, reason: str) -> None:
        self.counts.setdefault(kind, collections.Counter())[outcome] += 1
        if outcome == 'failed':
            is_new = all(failure.reason.partition(': ')[0] != reason.partition(': ')[0] for failure in self.failures)
            self.failures.append(Failure(kind, number, program, reason))
            if is_new:
                print(f'\n--- {kind} {number}: {reason}\n{program}\n', flush=True)


def _worker(kind: str, seed: int, numbers: tuple[int, int], seconds: float, stderr: Any) -> subprocess.Popen:
    command = [sys.executable, '-m', 'tests.fuzz.worker', kind, str(seed), *map(str, numbers), str(seconds)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def _lines(process: subprocess.Popen) -> queue.Queue:
    """The lines that a worker says, and None at its end."""
    said: queue.Queue = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(json.loads(line))
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    return said


def _death(process: subprocess.Popen, stderr: Any) -> str:
    code = process.wait()
    stderr.seek(0)
    words = stderr.read().decode(errors='replace').strip().splitlines()
    how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
    return f'the process died of {how}: {words[-1][:200] if words else "it said nothing"}'


def _try_kind(kind: str, seed: int, count: int, seconds: float, outcomes: Outcomes) -> None:
    """So many programs of one kind, or until the time is over; a process that dies of one is replaced, and goes on after it."""
    end, number = time.monotonic() + seconds, 0
    while number < count and time.monotonic() < end:
        with tempfile.TemporaryFile() as stderr:
            process = _worker(kind, seed, (number, count), end - time.monotonic(), stderr)
            said, program, is_running, is_done = _lines(process), '', False, False
            while True:
                try:
                    line = said.get(timeout=_LIMIT)
                except queue.Empty:
                    process.kill()
                    process.wait()
                    outcomes.add(kind, number, program, 'failed', f'it took more than {_LIMIT} s')
                    break
                if line is None:
                    if is_running or not is_done:
                        outcomes.add(kind, number, program, 'failed', _death(process, stderr))
                    break
                is_done = 'done' in line
                if 'program' in line:
                    number, program, is_running = line['number'], line['program'], True
                elif 'outcome' in line:
                    outcomes.add(kind, number, program, line['outcome'], line['reason'])
                    is_running = False
            process.wait()
            number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--seed', type=int, default=int(time.time()) % 2**31)
    parser.add_argument('--programs', type=int, default=10**9, help='at most so many of each kind')
    parser.add_argument('--kinds', default=','.join(cases.KINDS), help='some of them, separated by commas')
    args = parser.parse_args()
    chosen = args.kinds.split(',')
    if wrong := [kind for kind in chosen if kind not in cases.KINDS]:
        parser.error(f'--kinds={args.kinds}: {wrong[0]!r} does not exist. Known: {", ".join(cases.KINDS)}.')
    print(f'--seed={args.seed} --minutes={args.minutes:g}', flush=True)
    outcomes, threads = Outcomes(), []
    for shares in _SHARES:
        mine = {kind: share for kind, share in shares.items() if kind in chosen}

        def run(mine: dict[str, float] = mine) -> None:
            for kind, share in mine.items():
                _try_kind(kind, args.seed, args.programs, 60 * args.minutes * share / sum(mine.values()), outcomes)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print('| kind | programs | right | told in a line | failed |\n|---|---:|---:|---:|---:|')
    for kind, counts in outcomes.counts.items():
        print(f'| {kind} | {sum(counts.values()):,} | {counts["right"]:,} | {counts["told"]:,} | {counts["failed"]:,} |')
    for reason, count in collections.Counter(f'{f.kind}: {f.reason}' for f in outcomes.failures).most_common():
        print(f'{count} x {reason}')
    return 1 if outcomes.failures else 0


if __name__ == '__main__':
    sys.exit(main())
