"""Many runs of launch.py, a few at a time, each on one core; finished ones are kept, so that a table can be stopped and started."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from rich.progress import track


def train_all(runs: dict[pathlib.Path, list[str]], jobs: int) -> None:
    """Trains what is not finished yet.

    Args:
      runs: workdir to flags of launch.py, --config first.
      jobs: runs at a time.
    """
    free: list[int | None] = [None]
    if jobs > 1:
        cores = sorted(os.sched_getaffinity(0))
        free = [cores[i % len(cores)] for i in range(jobs)]

    def train(folder: pathlib.Path) -> None:
        core = free.pop()
        try:
            command = [sys.executable, 'launch.py', *runs[folder], '--config.checkpoint.keep=1', f'--workdir={folder}']
            affinity = None if core is None else lambda: os.sched_setaffinity(0, {core})
            done = subprocess.run(command, capture_output=True, text=True, preexec_fn=affinity)
            if done.returncode:
                raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr}')
        finally:
            free.append(core)

    open_ = [folder for folder in runs if not (folder / 'result.json').exists()]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, folder) for folder in open_]
        try:
            for future in track(concurrent.futures.as_completed(futures), total=len(futures), description='runs'):
                future.result()
        finally:  # after a failure the others are not started
            pool.shutdown(wait=False, cancel_futures=True)


def result(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / 'result.json').read_text())
