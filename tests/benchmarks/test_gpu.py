"""benchmarks.gpu where there is no GPU: its model, its sweep in the interpreter, and what it keeps."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks.gpu import check, kernels, model
from sparse_jax.core import errors
from sparse_jax.core.granularity import Block
from sparse_jax.kernels import lowering_for
from sparse_jax.kernels.gpu import config as config_lib

_ROOT = pathlib.Path(__file__).parents[2]
_LAYER = model.SHAPES[0]
_FIELDS = [field.name for field in dataclasses.fields(config_lib.Config)]


def _run(*flags):
    command = [sys.executable, '-m', 'benchmarks.gpu', *flags]
    return subprocess.run(command, cwd=_ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True)


def test_dry_run_checks_and_measures_in_the_interpreter():
    process = _run('--dry_run')
    assert process.returncode == 0, process.stderr
    assert 'RACE' not in process.stdout and 'left out' not in process.stderr
    assert 'all equal to the reference' in process.stdout and '| forward | 3x3 64 to 64, 64x2x2 | 64x64 | 50% |' in process.stdout


def test_without_a_gpu_the_sweep_is_refused_in_a_line():
    process = _run('--check')
    assert process.returncode == 2 and 'no measurement here: it runs on an NVIDIA GPU, not on cpu' in process.stderr


def test_a_config_that_is_refused_is_told_and_left_out_but_not_the_one_of_the_rule(capsys):
    shape, block = model.Shape((64, 1, 1, 128), (1, 1, 128, 64)), (64, 64)
    arrays = check.arguments('forward', *check.operands(shape, block, 0.5))
    refused, rule = config_lib.Config(block_m=36), config_lib.rule('forward', block, 64)
    with lowering_for('gpu', interpret=True):
        assert kernels._fastest('forward', shape, block, arrays, [rule, refused], 1) == rule
        assert 'left out: forward' in (message := capsys.readouterr().err) and 'block_m=36' in message
        with pytest.raises(AssertionError):
            kernels._fastest('forward', shape, block, arrays, [refused, rule], 1)


def test_a_config_whose_numbers_are_others_is_told_and_left_out(capsys, monkeypatch):
    right, wrong = config_lib.Config(), config_lib.Config(num_stages=3)
    monkeypatch.setattr(
        model, 'function', lambda kernel, shape, block, config: (lambda x: x * (1.02 if config == wrong else 1), ())
    )
    shape = model.Shape((64, 1, 1, 128), (1, 1, 128, 64))
    assert kernels._fastest('forward', shape, (64, 64), (jnp.ones(3),), [right, wrong], 1) == right
    assert 'left out: forward' in (message := capsys.readouterr().err) and 'its result is not that of' in message


def test_a_sweep_keeps_the_best_tiles_and_up_to_which_density_blocks_win(tmp_path, monkeypatch, capsys):
    """In the interpreter, which is slower than XLA's dense product: blocks never win."""
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    shape = model.Shape((64, 1, 1, 128), (1, 1, 128, 64))
    with lowering_for('gpu', interpret=True):
        kernels.sweep((shape,), ((64, 64),), (0.5,), ('forward',), rounds=1)
    name = config_lib.key('forward', shape.x, shape.w, (64, 64), jnp.bfloat16)
    rule = config_lib.rule('forward', (64, 64), 64)
    assert json.loads((tmp_path / 'gpu_configs.json').read_text()) == {'cpu': {name: dataclasses.asdict(rule)}}
    assert json.loads((tmp_path / 'crossovers.json').read_text()) == {'cpu': {'64x64': 0.0}}
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[2].startswith('| forward |') and rows[3].startswith('| **all three products** |')
    assert len({row.count('|') for row in rows}) == 1


def test_steps_are_those_of_the_tiles():
    """A 128x64 tile of tokens and a 64x64 block: two copies, and the products of all their elements."""
    step = model.step('forward', _LAYER, (64, 64), config_lib.Config(128, 64, 4))
    assert step == (2 * 128 * 64 * 64, 2 * (128 * 64 + 64 * 64), 2, 1)
    step = model.step('weight_gradient', _LAYER, (64, 64), config_lib.Config(64, 64, 3, 2))
    assert step == (2 * 2 * 64 * 64 * 64, 2 * 3 * 64 * 64, 3, 2)


def test_costs_are_those_of_the_pattern():
    """90% of 64 by 64 blocks: 410 units, 64 tiles of tokens; each unit of each tile is one step."""
    cost = model.cost('forward', _LAYER, (64, 64), 0.9)
    assert cost.operations == 410 * 64 * 2 * 128 * 64 * 64
    assert cost.cache_bytes == 410 * 64 * 2 * (128 * 64 + 64 * 64) + 2 * 8192 * 4096
    assert cost.memory_bytes == 2 * (2 * 8192 * 4096 + 410 * 64 * 64)
    assert cost.programs == 64 * 64 and cost.sum_bytes == 0  # 4,096 programs on 132 multiprocessors: the last turn has 4
    assert cost.seconds_by_resource('low', 'H100') == {
        'tensor cores': pytest.approx(cost.operations / 600e12 * 32 * 132 / 4096),
        'cache': pytest.approx(cost.cache_bytes / (0.85 * 5.5e12) * 32 * 132 / 4096),
        'memory': cost.memory_bytes / 3.35e12,
    }


def test_few_programs_leave_multiprocessors_idle_and_parts_of_sums_are_paid_for():
    """14 of 144 units of a convolution, two a program and 16 parts each; XLA reads as many parts as the pattern has room for, 32."""
    shape = model.SHAPES[2]
    cost, mask = model.cost('weight_gradient', shape, (64, 64), 0.9), model.random_mask(shape, (64, 64), 0.1)
    lists = [int(mask[..., i * 64].sum()) // 64 for i in range(4)]
    assert sum(lists) == 14 and cost.programs == 16 * sum(-(-n // 2) for n in lists)
    assert cost.sum_bytes == 32 * 64 * 64 * (16 * 4 + 2 + 2) + 2 * mask.size
    turns = -(-cost.programs // 132)
    assert cost.seconds_by_resource('high', 'H100')['tensor cores'] == pytest.approx(
        cost.operations / 600e12 * turns * 132 / cost.programs
    )
    assert cost.seconds('high', 'H200') == max(cost.seconds_by_resource('high', 'H200').values()) + cost.sum_bytes / 4.8e12


def test_every_shape_and_block_of_check_makes_a_pattern():
    for shape in check.CHECKED:
        for block in kernels.BLOCKS:
            x, w, dy, pattern = check.operands(shape, block, 0.7)
            assert (x.shape, w.shape, dy.shape, pattern.granularity) == (shape.x, shape.w, shape.y, Block(*block))


def test_the_aims_of_64_blocks_at_90_percent_are_predicted():
    parts = [model.cost(kernel, _LAYER, (64, 64), 0.9) for kernel in model.KERNELS[:3]]
    for gpu_name in model.MEMORY:
        dense = 3 * model.dense_seconds(_LAYER, gpu_name)
        assert dense == pytest.approx(3 * 2 * 8192 * 4096 * 4096 / 700e12)
        assert dense / sum(cost.seconds('low', gpu_name) for cost in parts) >= 2
        assert dense / sum(cost.seconds('high', gpu_name) for cost in parts) >= 3


def test_the_docs_have_the_tables_that_are_predicted():
    docs = {name: (_ROOT / 'docs' / name).read_text() for name in ('gpu.md', 'gpu_predicted.md')}
    assert '\n'.join(kernels.summary((_LAYER,), ((64, 64),))).split('\n', 2)[2] in docs['gpu.md']
    assert '\n'.join(kernels.predicted((model.SHAPES[2],), ((64, 64),), (0.9,))).split('\n', 2)[2] in docs['gpu_predicted.md']


def test_the_table_has_a_row_for_every_kernel_and_all_three():
    lines = list(kernels.predicted((_LAYER,), ((64, 64),), (0.9,)))
    assert len(lines) == 2 + 4 + 1 and '**all three products**' in lines[-1] and '2.35x, 5.49x' in lines[-1]
    assert len({line.count('|') for line in lines}) == 1


def test_the_best_configs_are_kept_for_this_kind_of_device(tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    arguments = ('forward', _LAYER.x, _LAYER.w, (64, 64), jnp.bfloat16)
    assert config_lib.choose(*arguments) == config_lib.rule('forward', (64, 64), 8192)
    best = config_lib.Config(256, 64, 3)
    config_lib.write({config_lib.key(*arguments): best})
    assert config_lib.choose(*arguments) == best
    assert config_lib.choose('forward', (64, 1, 1, 64), *arguments[2:]) == config_lib.rule('forward', (64, 64), 64)


@pytest.mark.parametrize(
    'entry',
    [dict(tokens=256, depth=64, stages=3, group=1), dict(block_m=256), {}, [256, 64, 3, 1], None, dict.fromkeys(_FIELDS, '64')],
    ids=['fields of an earlier version', 'fields that are missing', 'no fields', 'a list', 'null', 'text'],
)
def test_a_kept_config_with_other_fields_counts_as_not_measured(entry, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    errors.say_once.cache_clear()
    arguments = ('forward', _LAYER.x, _LAYER.w, (64, 64), jnp.bfloat16)
    (tmp_path / 'gpu_configs.json').write_text(json.dumps({'cpu': {config_lib.key(*arguments): entry}, 'NVIDIA H100': {'a': {}}}))
    for _ in range(2):
        assert config_lib.choose(*arguments) == config_lib.rule('forward', (64, 64), 8192)
    assert len(caplog.messages) == 1 and 'run python -m benchmarks.gpu again' in caplog.text
    best = config_lib.Config(256, 64, 3)
    config_lib.write({'another': best})  # what cannot be read is not kept, and other devices' entries are
    kept = json.loads((tmp_path / 'gpu_configs.json').read_text())
    assert kept == {'cpu': {'another': dataclasses.asdict(best)}, 'NVIDIA H100': {'a': {}}}


@pytest.mark.parametrize('kernel', model.KERNELS)
def test_every_config_of_a_rule_or_a_sweep_fits_and_has_three_stages(kernel):
    for block in ((32, 32), (64, 64), (128, 128), (128, 32)):
        configs = [config_lib.rule(kernel, block, images) for images in (1, 64, 100, 128, 8192)]
        for config in (*configs, *config_lib.candidates(kernel, block, 8192)):
            assert config.fits(kernel, block) and config.num_stages >= 3 and config.block_m % 64 == 0
