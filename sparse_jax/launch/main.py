"""Does what the command line says."""

import logging
import os
import pathlib
import sys
import zlib

from absl import app
from absl import logging as absl_logging

from sparse_jax.launch import command_line as flag


def _keep_programs() -> None:
    """Compiled programs are kept in this user's cache folder, for the next start; unless the environment names another folder, or none."""
    import jax

    from sparse_jax.kernels.cpu import compiler

    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or 'JAX_ENABLE_COMPILATION_CACHE' in os.environ:
        return
    try:
        folder = compiler.make_cache_folder() / f'programs-{zlib.crc32(compiler.processor().encode()):08x}'
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # then they are compiled anew
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)  # of the runs of a sweep


def _sweep(folder: pathlib.Path) -> None:
    """Trains a grid of experiments, and reports on them."""
    import jax

    from sparse_jax.report.write import write_report
    from sparse_jax.train import sweep

    jax.config.update('jax_platforms', 'cpu')  # of this process, which checks only: the accelerator is the runs'
    command = [str(pathlib.Path(sys.argv[0]).resolve()), *flag.of_config()]
    outcome = sweep.run(flag.CONFIG.value, folder, grids=flag.SWEEP.value, command=command, jobs=flag.JOBS.value or 1)
    write_report(folder)
    sweep.raise_failed(outcome)


def _train(folder: pathlib.Path) -> None:
    """Trains, and draws the run's report."""
    from sparse_jax import train
    from sparse_jax.report import run_report
    from sparse_jax.runtime import hosts

    if flag.INIT_FROM.value:
        flag.CONFIG.value.train.init_from = flag.INIT_FROM.value
    train.train(flag.CONFIG.value, folder)
    hosts.run_on_host0(run_report.show, folder)


def _lottery(folder: pathlib.Path) -> None:
    """Trains rounds of lottery tickets, and draws them."""
    from sparse_jax.report import lottery as report
    from sparse_jax.train import lottery

    rewind_step = flag.REWIND_STEP.value or 0
    rows = lottery.run(flag.CONFIG.value, folder, rounds=lottery.parse_rounds(flag.ROUNDS.value or '5'), rewind_step=rewind_step)
    lottery.print_table(rows)
    print(f'table:   {folder / lottery.TABLE}\npicture: {report.draw(folder)}')


def _plan() -> None:
    """Says which devices are best, and writes the page where a folder is named."""
    from sparse_jax.plan import run

    own = flag.HARDWARE.value
    config_flag = flag.of_config()[0]
    run.run(
        flag.CONFIG.value,
        pathlib.Path(config_flag.partition('=')[2].partition(':')[0]).stem,
        flag.DEVICES.value or '',
        folder=pathlib.Path(flag.WORKDIR.value) if flag.WORKDIR.value else None,
        outputs=flag.VOCABULARY.value,
        own_hardware=pathlib.Path(own) if own else None,
        prices=run.parse_prices(flag.PRICES.value or ''),
        deadline=flag.DEADLINE.value,
        exact=flag.EXACT.value,
        command=' '.join(['python', pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _join_hosts() -> None:
    """Finds the other processes of a job of many hosts."""
    from sparse_jax.runtime import hosts

    cluster = hosts.arguments(
        os.environ, coordinator=flag.COORDINATOR.value, num_processes=flag.PROCESSES.value, process_id=flag.PROCESS.value
    )
    hosts.initialize(cluster, initialization_timeout=flag.INITIALIZATION.value, heartbeat_timeout=flag.HEARTBEAT.value)
    if not hosts.is_host0():
        logging.getLogger('sparse_jax').setLevel(logging.WARNING)


def _do(folder: pathlib.Path) -> None:
    """What the mode says."""
    from sparse_jax import train

    if flag.LOWER_ONLY.value:
        from sparse_jax.aot import lowering

        lowering.run(flag.CONFIG.value, flag.LOWER_ONLY.value)
    elif flag.MODE.value == 'report':
        from sparse_jax.report.write import write_report

        write_report(folder, [pathlib.Path(path) for path in flag.RUNS.value])
    elif flag.MODE.value == 'sweep':
        _sweep(folder)
    elif flag.MODE.value == 'lottery':
        _lottery(folder)
    elif flag.MODE.value == 'plan':
        _plan()
    elif flag.MODE.value == 'evaluate':
        train.evaluate(flag.CONFIG.value, folder)
    elif flag.MODE.value == 'export':
        train.export(flag.CONFIG.value, folder, pathlib.Path(flag.TO.value or ''))
    else:
        _train(folder)


def main(argv) -> int:
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)  # of jax, orbax and matplotlib
    logging.getLogger('sparse_jax').setLevel(logging.INFO)
    from sparse_jax import train  # after the flags: a wrong flag is told at once
    from sparse_jax.runtime import failures, hosts
    from sparse_jax.train import console

    console.show_log()
    _keep_programs()
    folder = pathlib.Path(flag.WORKDIR.value or '')
    failures.prepare(debug=flag.DEBUG.value)
    try:
        if flag.DISTRIBUTED.value:
            _join_hosts()
        _do(folder)
    except ValueError as error:
        flag.wrong_input(error)
        # At once: where a damaged checkpoint was read, orbax's abandoned reads would otherwise add pages to that line.
        hosts.exit_now(2)
    except hosts.Preempted as error:
        print(error, file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print('interrupted: nothing was saved since the last checkpoint.', file=sys.stderr)
        hosts.exit_now(130)
    except train.NonFiniteError as error:
        print(f'error: {error}', file=sys.stderr)
        hosts.exit_now(78)
    except Exception as error:
        failures.show(error, debug=flag.DEBUG.value)
        hosts.exit_now(70)  # not waiting for a peer that may be dead, nor for what libraries print at their end
    return 0


def run() -> None:
    """Parses the command line, and does what it says; ends the process."""
    app.run(main, flags_parser=flag.parse)
