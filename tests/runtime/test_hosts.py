"""Several hosts, as real processes of this machine over gloo: real kills, stops and signals, and flags that do not fit."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.reliability import figures
from sparse_jax.runtime import hosts, records

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 200
FLAGS = (
    '--config=configs/mnist_lenet300.py:offline', f'--config.train.steps={STEPS}', '--config.checkpoint.every=50',
    '--config.log.every=10', '--config.sparsity.kernels=dense', '--config.sparsity.dense_gradient_window=None', '--config.mesh.data=2', '--config.mesh.model=2',
    '--config.mesh.layout=model+fsdp',
)  # fmt: skip


def _environment(**own):
    return os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'} | own


def _port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


class Hosts(figures.Run):
    """Two processes, each with flags of its own too."""

    def __init__(self, folder, *flags, own=((), ())):
        self.folder, self.processes, port = folder, [], _port()
        for i, flags_of_one in enumerate(own):
            known = (f'--coordinator=127.0.0.1:{port}', f'--num_processes={len(own)}', f'--process_id={i}')
            command = [sys.executable, 'launch.py', *FLAGS, f'--workdir={folder}', '--distributed', *known, '--heartbeat_timeout=8']
            with open(f'{folder}.{i}.log', 'w') as log:
                options = dict(cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=log)
                self.processes.append(subprocess.Popen([*command, *flags, *flags_of_one], **options))


def _outcome(folder):
    """What must be equal: results, and the fingerprint of every array at the end."""
    result = records.read(folder / 'result.json')
    return {k: v for k, v in result.items() if 'second' not in k and 'time' not in k} | {'fingerprint': figures.digest(folder)}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hosts') / 'undisturbed'
    with Hosts(folder) as run:
        assert run.wait() == [0, 0], run.said(0) + run.said(1)
    return folder


@pytest.mark.slow
def test_two_hosts_make_one_run(undisturbed):
    assert json.loads((undisturbed / 'result.json').read_text())['nonzeros'] == 13_310
    made = json.loads((undisturbed / 'run.json').read_text())
    assert (made['processes'], made['devices'], made['mesh']) == (2, 4, {'data': 2, 'model': 2})
    steps = [json.loads(line)['step'] for line in (undisturbed / 'metrics.jsonl').read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(10, STEPS + 1, 10)), 'only one host writes'


@pytest.mark.slow
def test_a_host_killed_at_random_costs_no_bit(undisturbed, tmp_path):
    """After the first checkpoint; the other one ends by itself. The same command then goes on."""
    chosen = random.Random(os.environ.get('PYTEST_XDIST_TESTRUNUID', '0'))
    victim, step = chosen.randrange(2), chosen.randrange(60, STEPS - 50, 10)
    folder = tmp_path / 'killed'
    with Hosts(folder) as run:
        run.until(step)
        run.processes[victim].kill()
        codes = run.wait()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 2, 75), (victim, step, codes)
    assert not (folder / 'result.json').exists()
    with Hosts(folder) as run:
        assert run.wait() == [0, 0], run.said(0)
    assert json.loads((folder / 'run.json').read_text())['resumed_at'] >= 50
    assert _outcome(folder) == _outcome(undisturbed), (victim, step)


@pytest.mark.slow
def test_sigterm_to_one_host_saves_the_same_step_on_both(tmp_path):
    folder, longer = tmp_path / 'preempted', '--config.train.steps=800'
    with Hosts(folder, longer) as run:
        run.until(60)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == [75, 75], run.said(0) + run.said(1)
        stopped = [line for i in range(2) for line in run.said(i).splitlines() if 'stopped by SIGTERM after step' in line]
    assert len(stopped) == 2 and stopped[0] == stopped[1]
    step = int(stopped[0].split('after step ')[1].split(',')[0])
    assert 60 <= step < 800 and (folder / 'checkpoints' / str(step)).exists()
    # another number of hosts: one process of four devices goes on
    command = [sys.executable, 'launch.py', *FLAGS, longer, f'--workdir={folder}']
    done = subprocess.run(command, cwd=ROOT, env=_environment(JAX_NUM_CPU_DEVICES='4'), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / 'run.json').read_text())['resumed_at'] == step
    result = json.loads((folder / 'result.json').read_text())
    assert result['nonzeros'] == 13_310 and result['test_accuracy'] > 0.85


@pytest.mark.slow
def test_a_hung_host_is_not_waited_for(tmp_path):
    with Hosts(tmp_path / 'hung') as run:
        run.until(20)
        run.processes[1].send_signal(signal.SIGSTOP)
        code = run.processes[0].wait(120)
        assert code not in (0, 2, 75) and run.processes[1].poll() is None, 'the stopped one is still there, stopped'


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures('interruptible')
def test_one_process_alone_stops_and_goes_on(number, tmp_path):
    """SIGTERM or Ctrl-C without --distributed; that a resumed run has the bits of an undisturbed one is tested in test_train.py."""
    flags = ('--config=configs/mnist_lenet300.py:offline', '--config.train.steps=1000', '--config.log.every=10', '--config.sparsity.kernels=dense')  # fmt: skip
    folder = tmp_path / 'stopped'
    command = [sys.executable, 'launch.py', *flags, f'--workdir={folder}']
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(JAX_NUM_CPU_DEVICES='1'), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while figures.last_step(folder) < 100:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and f'stopped by {number.name} after step' in said and 'Traceback' not in said
    assert 'the same command goes on from there' in said.splitlines()[-1]
    done = subprocess.run(command, cwd=ROOT, env=_environment(JAX_NUM_CPU_DEVICES='1'), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / 'run.json').read_text())['resumed_at'] == int(said.split('after step ')[1].split(',')[0]) < 1000


@pytest.mark.usefixtures('interruptible')
def test_a_second_interrupt_ends_at_once(capsys):
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached(1) and preemption.signal == 'SIGINT' and 'Ctrl-C once more' in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.usefixtures('interruptible')
def test_an_interrupt_before_the_first_step_is_one_line(tmp_path):
    command = [sys.executable, 'launch.py', '--config=configs/mnist_lenet300.py:offline', f'--workdir={tmp_path / "run"}']
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / 'run' / 'config.json').exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert 'Traceback' not in said
    if 'stopping after this step' in said:  # it was quicker
        assert process.returncode == 75
    else:
        assert process.returncode == 130 and said.splitlines()[-1].startswith('interrupted: ')


@pytest.mark.parametrize(
    ('own', 'message'),
    [
        ((('--config.seed=1',), ('--config.seed=2',)), 'host 1 was started otherwise than host 0: config.seed differ'),
        ((('--config.mesh.data=3',), ()), 'does not fit the 4 devices'),
        (((), ('--config.data.name=cifar11',)), "Did you mean 'cifar10'"),
    ],
    ids=['flags', 'mesh', 'data'],
)
@pytest.mark.slow
def test_wrong_input_on_one_host_is_told_on_all_and_makes_no_file(own, message, tmp_path):
    with Hosts(tmp_path / 'run', own=own) as run:
        assert run.wait() == [2, 2], run.said(0) + run.said(1)
        for i in range(2):
            told = [line for line in run.said(i).splitlines() if line.startswith('error: ')]
            assert len(told) == 1 and message in told[0], run.said(i)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_workdirs_that_are_not_shared(tmp_path):
    with Hosts(tmp_path / 'run', own=((), (f'--workdir={tmp_path}/another',))) as run:
        assert run.wait() == [2, 2]
        assert all('is not the same folder on all hosts' in run.said(i) for i in range(2))
    assert not (tmp_path / 'another').exists()


def test_a_coordinator_that_is_not_there(tmp_path):
    flags = (
        '--distributed',
        f'--coordinator=127.0.0.1:{_port()}',
        '--num_processes=2',
        '--process_id=1',
        '--initialization_timeout=3',
    )
    command = [sys.executable, 'launch.py', *FLAGS, f'--workdir={tmp_path}/run', *flags]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 70, done.stderr
    assert (
        'not all hosts came, within --initialization_timeout=3 s' in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
    ), done.stderr
    assert not (tmp_path / 'run').exists()


def test_no_cluster_at_all(tmp_path):
    command = [sys.executable, 'launch.py', *FLAGS, f'--workdir={tmp_path}/run', '--distributed']
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'no cluster was found' in done.stderr and '--coordinator=HOST:PORT' in done.stderr, done.stderr


def _slurm(i):
    return {
        'SLURM_JOB_ID': str(10_000 + _port() % 4096), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2',
        'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i), 'SLURM_STEP_TASKS_PER_NODE': '2',
    }  # fmt: skip


def _open_mpi(i):
    return {
        'OMPI_MCA_orte_hnp_uri': f'{_port()}.0;tcp://127.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': str(i),
        'OMPI_COMM_WORLD_LOCAL_RANK': str(i),
    }  # fmt: skip


def _xpk(i):
    return {'JAX_COORDINATOR_ADDRESS': '127.0.0.1', 'JAX_COORDINATOR_PORT': str(_port()), 'NNODES': '2', 'NODE_RANK': str(i)}


@pytest.mark.parametrize('cluster', [_slurm, _open_mpi, _xpk])
@pytest.mark.slow
def test_clusters_are_detected(cluster):
    """The variables that each of them sets, made up, for two real processes, which find each other by nothing else."""
    program = """
import os, jax
from sparse_jax.runtime import hosts
hosts.initialize(hosts.arguments(os.environ), initialization_timeout=60)
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())
"""
    first = cluster(0)
    environments = [first, {**first, **{k: v for k, v in cluster(1).items() if k.endswith(('RANK', 'PROCID', 'LOCALID'))}}]
    processes = [
        subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, env=_environment(**own), stdout=subprocess.PIPE, text=True)
        for own in environments
    ]
    assert [p.communicate(timeout=120)[0].split() for p in processes] == [['0', '2', '2', '4'], ['1', '2', '2', '4']]


@pytest.mark.slow
def test_the_coordinator_listens_on_the_address_it_was_given_and_no_other(tmp_path):
    port = _port()
    flags = (f'--coordinator=127.0.0.1:{port}', '--num_processes=2', '--process_id=0', '--initialization_timeout=30')
    command = [sys.executable, 'launch.py', '--config=configs/mnist_lenet300.py:offline', '--distributed', *flags]
    process = subprocess.Popen([*command, f'--workdir={tmp_path / "run"}'], cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    listening = []
    while not listening and process.poll() is None:
        time.sleep(0.05)
        for table in ('/proc/net/tcp', '/proc/net/tcp6'):
            rows = [line.split() for line in pathlib.Path(table).read_text().splitlines()[1:]]
            listening += [row[1].split(':')[0] for row in rows if row[3] == '0A' and int(row[1].split(':')[1], 16) == port]
    process.kill()
    process.wait()
    assert listening in (['0100007F'], ['0000000000000000FFFF00000100007F'])  # 127.0.0.1, as the kernel writes it for either family


def test_where_the_coordinator_listens():
    assert hosts.bind_address('localhost:80') in ('127.0.0.1:80', '[::1]:80') and hosts.bind_address('[::1]:80') in (
        '[::1]:80',
        None,
    )
    assert hosts.bind_address('192.0.2.7:80') is None, 'an address of another machine'
    assert hosts.bind_address('no.such.host.invalid:80') is None


def test_what_jax_is_told():
    xpk = {
        'JAX_COORDINATOR_ADDRESS': 'a',
        'JAX_PROCESS_COUNT': '8',
        'PROCESSES_IN_JOB': '4',
        'JOB_INDEX': '1',
        'JOB_COMPLETION_INDEX': '2',
    }
    assert hosts.arguments(xpk) == {'coordinator_address': 'a:1234', 'num_processes': 8, 'process_id': 6}
    told = hosts.arguments(xpk, coordinator='b:9', num_processes=2, process_id=0)
    assert told == {'coordinator_address': 'b:9', 'num_processes': 2, 'process_id': 0}, 'flags come first'
    gpus = {'SLURM_PROCID': '0', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}
    assert hosts.arguments(gpus) == {'local_device_ids': [0, 1, 2, 3]}, 'one task with four GPUs has them all'
    assert hosts.arguments({**gpus, 'SLURM_STEP_TASKS_PER_NODE': '4(x4)'}) == {} == hosts.arguments({})
    for environ, flags, message in (
        ({}, dict(coordinator='a:1'), '--num_processes, --process_id is missing'),
        ({}, dict(coordinator='a', num_processes=2, process_id=0), 'must be host:port'),
        ({}, dict(coordinator='a:1', num_processes=2, process_id=2), 'process 2 of 2 .* does not exist: they are 0 to 1'),
        ({'JAX_COORDINATOR_ADDRESS': 'a', 'NNODES': '2'}, {}, "xpk's variables are incomplete .*NODE_RANK"),
    ):
        with pytest.raises(ValueError, match=message):
            hosts.arguments(environ, **flags)


# Checkpoints that are damaged
