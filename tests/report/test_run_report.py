"""The picture and the table of a run, from metrics made up."""

import numpy as np
import pytest

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


def test_table_tells_sizes_accuracy_and_time(capsys):
    layers = {'fc/kernel': [50, 1000]}
    result = {'model': 'm', 'method': 'sparse_momentum', 'layers': layers, 'nonzeros': 50, 'density': 0.05, 'parameters': 1010}
    costs = {'operations_inference_against_dense': 0.051, 'operations_training_against_dense': 0.366, 'exploration_rate': 0.25}
    run_report.print_table(result | {'test_accuracy': 0.9312, 'steps': 4000, 'seconds': 12.34, 'steps_per_second': 324.1, **costs})
    out = capsys.readouterr().out
    for text in ('fc/kernel', '1,000', '5.00%', '93.12%', '4,000', '12.3 s', '5.1%', '36.6%', '25.0%'):
        assert text in out


def test_metrics_after_the_checkpoint_and_a_line_cut_off_are_dropped(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 100, "loss": 1.0}\n{"step": 200, "loss": 0.5}\n{"step": 3')
    writer = metrics.Writer(tmp_path, step=100, tensorboard=False)
    writer.write(200, {'loss': 0.25, 'density': {'a': 0.5}})
    writer.close()
    assert metrics.read(tmp_path) == [{'step': 100, 'loss': 1.0}, {'step': 200, 'loss': 0.25, 'density': {'a': 0.5}}]
