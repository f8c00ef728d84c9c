"""What is printed of a step on a GPU, and the command that a person with a GPU runs."""

import json

import pytest

from benchmarks.gpu import check_device, checks, measured, parts, step
from tests.benchmarks.test_step import TEXT


def test_a_step_takes_its_bytes_or_operations_and_a_launch_for_each_kernel():
    counted = parts.count(TEXT, 1.0, 0)
    dot, row = counted.parts['dense products'], 4 * 8 * 16
    assert dot.seconds == pytest.approx(dot.bytes / parts.MEMORY + parts.LAUNCH)  # far more bytes than operations
    assert counted.total.kernels == 4 + 4 + 1 + 1  # both kernels of a loop four times
    assert counted.total.bytes == 4 * (row + 4 + row + 4 * 8) + 4 * (row + 4 + row) + 2 * 2 * 8 * 16 + dot.bytes
    assert counted.part_of['written'] == counted.part_of['copy'] == 'copies' and counted.part_of['y'] == 'dense products'


def test_a_dumped_program_is_counted_with_what_the_host_adds(tmp_path, capsys):
    (tmp_path / 'program.txt').write_text(TEXT)
    step.main(['--predict', f'--program={tmp_path}/program.txt', '--host_ms=9.3'])
    said = capsys.readouterr().out
    assert 'assumed: 4 TB/s, dense products 750 TFLOP/s, 3 us a kernel' in said
    assert '| host, while the device waits | 0 | 0.00 | 0.00 | 9.30 |' in said and '| **all** | 10 |' in said
    assert '9.33 |' in said.splitlines()[-1]  # ten launches


def test_measured_beside_predicted(tmp_path):
    counted = parts.count(TEXT, 1.0, 0)
    took = {'dense products': 2e-3, 'copies': 1e-3, measured.IDLE: 5e-4, measured.OTHER: 1e-4}
    one = measured.Measured(counted, 4e-3, took, 10**9, 3.0, 0.5)
    text = step.measured_table(one)
    assert '| dense products | 1 | 0.00 | 0.00 | 0.00 | 2.00 |' in text and '| nothing runs | | | | | 0.50 |' in text
    assert text.splitlines()[-2].endswith('| 3.60 |') and text.splitlines()[-1] == "| by the host's clock | | | | | 4.00 |"
    step.draw({'dense': took, 'sparse_momentum': {'sparse products': 1e-3}}, 'a step', tmp_path / 'new' / 'bars.png')
    assert (tmp_path / 'new' / 'bars.png').stat().st_size > 5000


def test_no_time_left_is_told_and_the_table_is_kept(tmp_path, capsys):
    assert check_device.main(['--dry_run', '--minutes=0', f'--out={tmp_path}/out']) == 0
    rows = json.loads((tmp_path / 'out' / 'table.json').read_text())
    assert [row['check'] for row in rows] == list(checks.CHECKS)
    assert {row['result'] for row in rows} == {'not run: no time was left'}
    with pytest.raises(SystemExit):
        check_device.main(['--dry_run', f'--out={tmp_path}/out'])
    assert 'is there already: name another folder' in capsys.readouterr().err


@pytest.mark.parametrize(('run', 'flags', 'message'), [
    (check_device.main, ['--out=out'], 'sees no GPU by jax, but cpu: name a Python that has jax for it'),
    (step.main, ['--measure'], 'sees no GPU by jax, but cpu: --predict needs none'),
    (step.main, ['--predict', '--program=nowhere.txt'], '--program=nowhere.txt is not a file'),
    (step.main, ['--predict', '--density=7'], '--density=7.0: must be in (0, 1]'),
    (step.main, [], 'one of the arguments --predict --measure is required'),
])  # fmt: skip
def test_what_cannot_be_measured_or_predicted_is_told_first(run, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_a_check_found_before_it_failed_counts(tmp_path, capsys):
    def failing():
        yield checks.Row('one', 'fine', 'fine', True)
        raise RuntimeError('the device\nis gone')

    assert check_device._one(failing(), tmp_path / 'rows.json') == 1
    assert json.loads((tmp_path / 'rows.json').read_text()) == [['one', 'fine', 'fine', True]]
    assert capsys.readouterr().out.splitlines()[-1] == 'RuntimeError: the device is gone'


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_ended_and_told(tmp_path):
    rows = check_device._run('kernels', True, 1.0, tmp_path)
    assert rows[-1].right is False and rows[-1].result.startswith('not done after ')


@pytest.mark.slow
def test_a_step_is_measured_by_part():
    config = step.settings('lm_128', 'sparse_momentum', 0.25, 64)
    config.sparsity.kernels = 'reference'
    one = measured.measure(config, rounds=2, queued=1)
    assert one.host > 0 and one.compile_seconds > 0 and 0 < one.loss < 10
    assert one.by_part['dense products'] > 0 and set(one.by_part) <= {*one.counted.parts, measured.IDLE, measured.OTHER}
    assert one.counted.parts['dense products'].operations > 6 * 2 * 64 * 2 * (4 * 128**2 + 3 * 128 * 384)  # 6 a weight and token
