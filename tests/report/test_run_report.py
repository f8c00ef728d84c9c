"""The picture and the table of a run, from metrics made up."""

import json
import re

import numpy as np
import pytest

from sparse_jax import config as config_lib
from sparse_jax.report import run_report
from sparse_jax.train import metrics


def _rows():
    for step in range(0, 400, 40):
        yield {'step': step, 'density': {'a': 0.05 + step / 1e4, 'b': 1.0}, 'flips': 400 - step}
    for step in range(100, 401, 100):
        yield {'step': step, 'loss': 1 / step, 'accuracy': 0.9}
        yield {'step': step, 'test_loss': 2 / step, 'test_accuracy': 0.8}


@pytest.mark.parametrize('input_counts', [None, np.arange(784).reshape(28, 28)])
@pytest.mark.parametrize('dense', [False, True])
def test_picture_is_drawn(input_counts, dense, tmp_path):
    import matplotlib.image

    rows = [r for r in _rows() if not (dense and 'density' in r)]
    run_report.draw(tmp_path / 'report.png', rows, title='a run', input_counts=input_counts)
    image = matplotlib.image.imread(tmp_path / 'report.png')
    assert image.shape[0] > 600 and image.shape[1] > 900
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20, 'the picture is empty'
    assert [p.name for p in tmp_path.iterdir()] == ['report.png']


def _result(layers):
    size = sum(size for _, size in layers.values())
    nonzeros = sum(count for count, _ in layers.values())
    result = {
        'model': 'm',
        'data': 'mnist',
        'method': 'set',
        'layers': layers,
        'nonzeros': nonzeros,
        'density': nonzeros / size,
        'parameters': size + 10,
    }
    costs = {'operations_inference_against_dense': 0.051, 'operations_training_against_dense': 0.366, 'exploration_rate': 0.25}
    return result | {'test_accuracy': 0.9312, 'steps': 4000, 'seconds': 12.34, 'steps_per_second': 324.1, **costs}


def test_table_tells_sizes_accuracy_and_time(capsys):
    run_report.print_table(_result({'fc/kernel': [50, 1000]}))
    out = capsys.readouterr().out
    for text in ('fc/kernel', '1,000', '5.00%', '93.12%', '4,000', '12.3 s', '5.1%', '36.6%', '25.0%'):
        assert text in out


def test_long_names_stay_on_one_line_and_apart(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    names = [f'encoder/layer_{i}/attention/self_attention/{part}/kernel' for i in (1, 12) for part in ('query', 'out')]
    run_report.print_table(_result({name: [50, 1_000_000] for name in names}))
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[1] for line in lines if '1,000,000' in line}
    assert len(shown) == 4 and all(name.startswith('encoder/') and name.endswith('/kernel') for name in shown)
    assert max(map(len, lines)) <= 80


def test_a_finished_workdir_is_shown_and_drawn_once(tmp_path, capsys):
    folder = tmp_path / 'run'
    with pytest.raises(ValueError, match='has no result: train first'):
        run_report.show(folder)
    folder.mkdir()
    (folder / 'result.json').write_text(json.dumps(_result({'fc1/kernel': [50, 1000]})))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in _rows()))
    row = {'density': 0.05, 'implementation': 'cpu', 'seconds': {'dense': 2e-3, 'cpu': 1e-3}}
    (folder / 'kernels.json').write_text(json.dumps({'0': {'fc1/kernel': row}}))
    drawn = []
    for kernels in ('auto', 'dense'):
        (folder / 'run.json').write_text(json.dumps({'kernels': kernels}))
        run_report.show(folder)
        out = capsys.readouterr().out
        assert '93.12%' in out and ('2.00 ms' in out) == (kernels == 'auto'), 'choices are shown where the run took them'
        drawn.append((folder / 'report.png').stat().st_mtime_ns)
    assert drawn[0] == drawn[1]


def test_metrics_after_the_checkpoint_and_a_line_cut_off_are_dropped(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 100, "loss": 1.0}\n{"step": 200, "loss": 0.5}\n{"step": 3')
    writer = metrics.Writer(tmp_path, config_lib.Log(), step=100, logged=100)
    writer.write(200, {'loss': 0.25, 'density': {'a': 0.5}})
    writer.close()
    assert metrics.read(tmp_path) == [{'step': 100, 'loss': 1.0}, {'step': 200, 'loss': 0.25, 'density': {'a': 0.5}}]


def test_the_table_says_what_computed_attention(capsys):
    run_report.print_table(_result({'fc/kernel': [50, 1000]}), 'cudnn')
    assert re.search(r'attention by\s*│\s*cudnn', capsys.readouterr().out)
