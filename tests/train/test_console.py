"""What a person sees while a run trains: on terminals of two widths, and through a pipe."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from sparse_jax.train import metrics

_PROGRAM = """
import logging, time
from sparse_jax.train import console, metrics
console.show_log()
logging.getLogger('sparse_jax').setLevel(logging.INFO)
progress = metrics.Progress(12_000, 0)
time.sleep(0.3)
for step in range(1200, 12_001, 1200):
    values = {'loss': 0.0123456, 'accuracy': 0.987654, 'test_accuracy': 0.91, 'steps_per_second': 1234.6}
    progress.show(step, values)
    if step == 2400:
        logging.getLogger('sparse_jax').info('kernels: [fc1/kernel] at 5.00%% takes cpu%s', ' and more' * 20)
    time.sleep(0.3)
progress.close()
print('done')
"""


def _on_a_terminal(columns: int) -> list[str]:
    """The lines that a terminal of this width gets, without its control sequences."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, columns)) if hasattr(termios, 'tcsetwinsize') else _set_size(slave, columns)
    environment = {key: value for key, value in os.environ.items() if key not in ('COLUMNS', 'NO_COLOR')} | {'TERM': 'xterm'}
    process = subprocess.Popen([sys.executable, '-c', _PROGRAM], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b''
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        output += part
    os.close(master)
    assert process.wait() == 0, output.decode()
    return [line for line in re.split(r'[\r\n]+', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', output.decode())) if line.strip()]


def _set_size(slave: int, columns: int) -> None:
    import fcntl

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))


@pytest.mark.parametrize('columns', [80, 200])
def test_a_terminal_shows_whole_numbers_and_lines_above_the_bar(columns):
    lines = _on_a_terminal(columns)
    bars = [line for line in lines if '12000' in line]
    assert any('compiling' in line for line in bars)
    wanted = ['loss 0.0123', 'test 91.0%', '1,235 steps/s'] + (['accuracy 98.8%'] if columns == 200 else [])
    assert all(number in bars[-1] for number in wanted), bars[-1]
    assert all(len(line) <= columns for line in bars)
    message = next(i for i, line in enumerate(lines) if 'kernels: [fc1/kernel] at 5.00% takes cpu' in line)
    assert re.match(r'\d\d:\d\d:\d\d kernels', lines[message])
    assert any('12000' in line for line in lines[message + 1 :]) and lines[-1] == 'done'


def test_a_pipe_gets_a_line_an_interval():
    done = subprocess.run([sys.executable, '-c', _PROGRAM], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    steps = [line for line in lines if ' step ' in line]
    assert 'compiling' in lines[0] and len(steps) == 10 and len(lines) == 12
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d step 1200/12000  loss 0.0123  accuracy 98.8%  test 91.0%  1,235 steps/s  0:00:\d\d left', steps[0]
    )
    assert steps[-1].endswith('steps/s') and '\x1b' not in done.stderr
    assert metrics.numbers({}) == ''
