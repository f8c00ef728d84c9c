"""The report on many runs: statistics against scipy, published numbers, and workdirs that are broken, unfinished or of all kinds."""

import html.parser
import json
import pathlib
import re
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from scipy import stats

from sparse_jax import config as config_lib
from sparse_jax.report import aggregate, published
from sparse_jax.report.collect import collect, dense_twin
from sparse_jax.report.write import write_report

ROOT = pathlib.Path(__file__).parents[2]


def _write(
    folder, *, seed=0, accuracy=0.9, method='sparse_momentum', density=0.05, model='lenet300', data='mnist', rows=True, **values
):
    """A finished run's files, as the loop writes them."""
    config = config_lib.Config(seed=seed)
    config.model.name, config.data.name = model, data
    config.sparsity.method, config.sparsity.density = method, density
    for name, value in values.pop('settings', {}).items():
        config_lib.override(config, name, value)
    share = 1.0 if method == 'dense' else density
    result = {
        'model': model, 'data': data, 'method': method, 'steps': 400, 'parameters': 1010, 'nonzeros': round(1000 * share), 'density': share,
        'layers': {'a/kernel': [round(800 * share), 800], 'b/kernel': [round(200 * share), 200]}, 'test_accuracy': accuracy,
        'operations_training_against_dense': share, 'operations_inference_against_dense': share, 'seconds': 10.0 + seed,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config_lib.identity(config)))
    (folder / 'result.json').write_text(json.dumps(result | values))
    (folder / 'run.json').write_text(json.dumps({'max_memory_mib': 1234, 'device': 'cpu', 'jax': '0.10.2', 'resumed_at': 0}))
    if rows:
        lines = [{'step': s, 'density': {'a/kernel': share, 'b/kernel': share}} for s in range(0, 400, 100)]
        lines += [{'step': s, 'test_accuracy': accuracy - 0.1 + s / 4000} for s in range(100, 401, 100)]
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


ACCURACIES = {0: 0.981, 1: 0.985, 2: 0.990}


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in ACCURACIES.items():
        _write(tmp_path / 'sm' / str(seed), seed=seed, accuracy=accuracy)
        _write(tmp_path / 'deep' / 'er' / f'dense{seed}', seed=seed, accuracy=accuracy + 0.003, method='dense')
    return tmp_path


def test_means_errors_and_intervals_equal_scipy(runs):
    (table,) = aggregate.tables(collect([runs])[0])
    assert [(g.method, g.density, len(g.runs)) for g in table.groups] == [('dense', 1.0, 3), ('sparse_momentum', 0.05, 3)]
    values = 100 * np.array(list(ACCURACIES.values()))
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    row = dict(zip(aggregate.columns(table), aggregate.cells(table, table.groups[1]), strict=True))
    assert row['test accuracy %'] == f'{values.mean():.2f}' and row['standard error'] == f'{stats.sem(values):.2f}'
    assert row['95% interval'] == f'{low:.2f} to {high:.2f}'
    assert row['published %'] == '98.53' and row['runs'] == '3' and row['nonzeros'] == '50' and row['seconds a run'] == '11.0'
    dense = dict(zip(aggregate.columns(table), aggregate.cells(table, table.groups[0]), strict=True))
    assert dense['published %'] == '98.69' and dense['density'] == '100%'
    assert (
        row['minus dense, points (95% interval)'] == '-0.30 (-0.30 to -0.30)' and dense['minus dense, points (95% interval)'] == ''
    )


def test_runs_are_paired_with_the_dense_ones_of_their_seeds_and_settings(tmp_path):
    differences = {0: 0.01, 1: -0.02, 2: 0.005}
    for seed, difference in differences.items():
        slow, fast = ([{'step': s, 'steps_per_second': v} for s, v in enumerate(speeds)] for speeds in ((1, 20, 22), (2, 60, 66)))
        _write(tmp_path / f's{seed}', seed=seed, accuracy=0.9 + 0.02 * seed + difference)
        _write(tmp_path / f'd{seed}', seed=seed, accuracy=0.9 + 0.02 * seed, method='dense')
        for name, rows in ((f's{seed}', fast), (f'd{seed}', slow)):
            (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    _write(tmp_path / 'other', seed=0, accuracy=0.5, settings={'optimizer.learning_rate': '0.2'})  # has no twin
    (table,) = aggregate.tables(collect([tmp_path])[0])
    rows = [dict(zip(aggregate.columns(table), aggregate.cells(table, group), strict=True)) for group in table.groups]
    values = 100 * np.array(list(differences.values()))
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    paired = 'minus dense, points (95% interval)'
    [row] = [row for row in rows if row[paired]]
    assert row[paired] == f'{values.mean():+.2f} ({low:+.2f} to {high:+.2f})' and row['runs'] == '3'
    assert row['speed of dense'] == '3.00x' and row['steps/s'] == '63'


def test_one_run_has_no_interval(tmp_path):
    _write(tmp_path / 'one', data='digits32', model='vgg_d')
    (table,) = aggregate.tables(collect([tmp_path])[0])
    row = dict(zip(aggregate.columns(table), aggregate.cells(table, table.groups[0]), strict=True))
    assert row['test accuracy %'] == '90.00' and row['standard error'] == row['95% interval'] == ''
    assert 'published %' not in row, 'the digits are not CIFAR'


def test_groups_are_apart_by_every_setting_but_the_seed_and_copies_are_named(runs):
    _write(runs / 'copy', seed=0, accuracy=0.5)
    _write(runs / 'other', seed=0, accuracy=0.7, settings={'optimizer.learning_rate': '0.2'})
    _write(runs / 'dense_at_10', seed=0, accuracy=0.5, method='dense', density=0.1)  # the same as dense at 5%: it has no density
    found, problems = collect([runs])
    assert {p.folder.name: p.reason for p in problems} == {
        'dense_at_10': f'has the settings and the seed of {runs / "deep" / "er" / "dense0"}',
        '0': f'has the settings and the seed of {runs / "copy"}',
    }
    (table,) = aggregate.tables(found)
    assert [(g.label, len(g.runs)) for g in table.groups if g.method == 'dense'] == [('dense (learning_rate=0.1)', 3)]
    assert {g.label: len(g.runs) for g in table.groups if g.method != 'dense'} == {
        'sparse_momentum (learning_rate=0.1)': 3,
        'sparse_momentum (learning_rate=0.2)': 1,
    }


class _Checker(html.parser.HTMLParser):
    """Collects text and addresses, and checks that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ('src', 'href', 'xlink:href') and value]
        if tag not in ('meta', 'br', 'link', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f'{tag} is closed out of order'

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ('src', 'href', 'xlink:href') and value]

    def handle_data(self, data):
        self.text.append(data)


def _page(folder):
    checker = _Checker()
    content = (folder / 'report.html').read_text()
    checker.feed(content)
    assert not checker.open
    return checker, content


def test_the_page_is_whole_self_contained_and_follows_the_theme(runs, capsys):
    write_report(runs)
    checker, content = _page(runs)
    assert all(address.startswith('#') for address in checker.addresses), 'everything is in the page'
    assert not re.findall(r'@import|url\((?!#)', content)
    assert checker.tags.count('svg') == 3 + 1, 'density, operations, while training; the layers of one sparse group'
    text = ' '.join(checker.text)
    for words in ('lenet300 on mnist', '98.53', '6 finished runs', 'sparse_learning, results/MNIST_sparse_summary.csv', '1,234'):
        assert words in text
    assert 'prefers-color-scheme: dark' in content and '#010203' not in content, 'colours of figures are variables'
    ids = re.findall(r' id="([^"]+)"', content)
    referred = set(re.findall(r'url\(#([^)]+)\)', content)) | {a[1:] for a in checker.addresses if a != '#problems'}
    assert referred <= set(ids)
    assert (runs / 'report.md').read_text().count('\n| ') == 3 and '**lenet300 on mnist**' in capsys.readouterr().out
    assert sorted(p.name for p in runs.iterdir()) == ['deep', 'report.html', 'report.md', 'sm']


def test_the_page_links_to_each_runs_own_report(tmp_path):
    folder = tmp_path / 'one "run" & more#1'
    _write(folder)
    _write(tmp_path / 'without', seed=1)
    (folder / 'report.png').write_bytes(b'')
    write_report(tmp_path)
    checker, content = _page(tmp_path)
    (address,) = [address for address in checker.addresses if not address.startswith('#')]
    assert pathlib.Path(tmp_path, urllib.parse.unquote(address)) == folder / 'report.png'
    assert f'>{html.escape(folder.name)}</a>' in content and '>without<' in content


def test_broken_unfinished_and_mixed_workdirs(runs):
    _write(runs / 'vgg', model='vgg_d', data='cifar10', accuracy=0.93, rows=False)
    values = dict(eval_loss=1.5, validation_bits_per_byte=2.2, test_accuracy=None)
    _write(runs / 'lm', model='transformer', data='stdlib', **values)
    _write(runs / 'b1_unfinished', seed=9)
    (runs / 'b1_unfinished' / 'result.json').unlink()
    _write(runs / 'b2_result', seed=9)
    (runs / 'b2_result' / 'result.json').write_text('{"model": "len')
    _write(runs / 'b3_config', seed=9)
    (runs / 'b3_config' / 'config.json').write_text('')
    _write(runs / 'b4_old', seed=9)
    (runs / 'b4_old' / 'result.json').write_text('{"model": "lenet300"}')
    _write(runs / 'b5_list', seed=9)
    (runs / 'b5_list' / 'result.json').write_text('[]')
    _write(runs / 'b6_types', seed=9, accuracy=0.5)
    broken = json.loads((runs / 'b6_types' / 'result.json').read_text())
    (runs / 'b6_types' / 'result.json').write_text(json.dumps(broken | {'test_accuracy': 'x', 'nonzeros': None, 'model': ['a']}))
    _write(runs / 'rows_cut', seed=4, accuracy=0.98)
    (runs / 'rows_cut' / 'metrics.jsonl').write_text(
        '{"step": 0, "density": {"a/kernel": 0.05}, "test_accuracy": NaN}\n[1]\n{"step": 1, "test_accuracy": "a", "density": {"a": "b"}}\n{"ste'
    )
    (runs / 'rows_cut' / 'run.json').write_text('broken')
    (runs / 'empty').mkdir()
    write_report(runs)
    checker, _ = _page(runs)
    text = ' '.join(checker.text)
    assert '6 workdirs not in the tables' in text
    markdown = (runs / 'report.md').read_text()
    for name, reason in (
        ('b1_unfinished', 'not finished: its last metrics are of step 400'),
        ('b2_result', 'result.json cannot be read'),
        ('b3_config', 'config.json cannot be read'),
        (
            'b4_old',
            'result.json is broken, or made by another version: it has no usable nonzeros, parameters, steps, density, seconds, data, method',
        ),
        ('b6_types', 'result.json is broken, or made by another version: it has no usable nonzeros, model, test_accuracy'),
        ('b5_list', 'result.json cannot be read'),
    ):
        assert f'- `{name}`: {reason}' in markdown and name in text
    for heading in ('**lenet300 on mnist**', '**vgg_d on cifar10**', '**transformer on stdlib**'):
        assert heading in markdown
    assert '93.33, 92.91 (SNIP)' in markdown and '| 1.5000 |' in markdown and '| 2.2000 |' in markdown
    assert '| sparse_momentum | 5% | 50 | 4 |' in markdown, 'a run with cut metrics still counts'


@pytest.mark.slow
def test_report_mode_from_the_launcher(runs, tmp_path):
    launch = lambda *flags: subprocess.run(
        [sys.executable, 'launch.py', '--mode=report', *flags], cwd=ROOT, capture_output=True, text=True
    )
    done = launch(f'--workdir={runs}')
    assert done.returncode == 0, done.stderr
    assert 'report.html' in done.stdout and (runs / 'report.html').exists()
    (tmp_path / 'nothing').mkdir()
    for flags, message in (
        ([f'--workdir={tmp_path / "nothing"}'], 'holds no run'),
        ([f'--workdir={tmp_path / "nowhere"}'], 'is not a folder'),
        ([f'--workdir={runs}', f'--runs={tmp_path / "nowhere"}'], f'--runs={tmp_path / "nowhere"} is not a folder'),
        ([f'--workdir={runs}', '--jobs=2'], '--jobs has no meaning with --mode=report'),
        ([f'--workdir={runs}', '--config=configs/mnist_lenet300.py'], '--config has no meaning with --mode=report'),
        ([], '--workdir is missing'),
    ):
        wrong = launch(*flags)
        assert wrong.returncode == 2 and message in wrong.stderr and len(wrong.stderr.strip().split('\n')) == 1, wrong.stderr
    assert not list((tmp_path / 'nothing').iterdir())
    chosen = launch(f'--workdir={tmp_path / "page"}', f'--runs={runs / "sm" / "0"}', f'--runs={runs / "deep"}')
    assert chosen.returncode == 0, chosen.stderr
    assert '| 5% | 50 | 1 |' in chosen.stdout and sorted(p.name for p in (tmp_path / 'page').iterdir()) == [
        'report.html',
        'report.md',
    ]


def test_whatever_a_workdir_holds_the_page_stands(runs):
    """Fifty runs, of which many hold what no run writes: each of those is listed with its reason, or shown as it is."""
    _write(runs / 'other' / '$x_{1$', seed=7, model='lenet$300', settings={'data.pattern': 'a\x00$\\frac', 'sparsity.dense': '$'})
    names = {'$\\alpha$/kernel': 0.05, 'b/<kernel>': 0.05}
    (runs / 'other' / '$x_{1$' / 'metrics.jsonl').write_text(
        ''.join(json.dumps({'step': s, 'density': names, 'test_accuracy': 0.5}) + '\n' for s in (0, 100, 200))
    )
    path = runs / 'sm' / '0'
    whole = {name: (path / name).read_text() for name in ('config.json', 'result.json', 'run.json', 'metrics.jsonl')}
    wrong = {
        'result.json': ['null', '[]', '""', '{}', '', '[' * 100_000, '\xff', None, whole['result.json'].replace('"test_accuracy": 0.981', '"test_accuracy": 1' + '0' * 400),
                        whole['result.json'].replace('0.981', 'NaN'), whole['result.json'].replace('"layers": {', '"layers": {"x": 1, ')],
        'config.json': ['null', '{"seed": "a"}', '{"sparsity.density": [0.05]}', '{"sparsity.density": -1}', '', '\xff', None],
    }  # fmt: skip
    harmless = {
        'run.json': ['null', '[1]', '', '\xff', '{"max_memory_mib": "many", "device": 3}', None],
        'metrics.jsonl': [
            '', '\n\n', 'null\n[]\n', '{"step": 1', '\xff\xfe\n', '{"step": -1}\n', '{"step": 1e400, "loss": 1}\n', '{"step": 0, "density": {}}\n',
            '{"step": 0, "density": 3, "test_accuracy": {"a": 1}}\n' * 2,
            '{"step": 0, "density": {"a": 0.0}}\n{"step": 5, "density": {"b": 1}}\n', '{"step": 0, "density": {"\\ud800": 1}}\n', None,
        ],
    }  # fmt: skip
    listed = {}
    for kind, contents in (wrong | harmless).items():
        for number, content in enumerate(contents):
            folder = runs / 'broken' / f'{kind}{number}'
            _write(folder, seed=10 + len(listed), accuracy=0.981)
            listed[folder.name] = kind in wrong
            (folder / kind).unlink()
            if content is None:
                (folder / kind).mkdir()
            else:
                (folder / kind).write_bytes(content.encode('latin-1'))
    undecodable = runs / b'\xff\xfe'.decode(errors='surrogateescape')
    _write(undecodable, seed=9)
    (undecodable / 'result.json').write_text('null')
    write_report(runs)
    _, content = _page(runs)
    markdown = (runs / 'report.md').read_text()
    for name, is_wrong in listed.items():
        assert (f'`broken/{name}`: {name.rstrip("0123456789")} ' in markdown) == is_wrong, name
    assert r'`\udcff\udcfe`: result.json cannot be read' in markdown
    finished = 6 + 1 + len(listed) - sum(listed.values())
    assert f'{finished} finished runs' in content and len(listed) + 8 == 44
    assert r'$\alpha$' in content, 'a name is shown as it is, and is no formula'


def test_labels_are_effective_values_and_whole(tmp_path):
    _write(tmp_path / 'a', settings={'train.steps': '4000'}, steps=4000)
    _write(tmp_path / 'b', seed=1, steps=4000)  # as many by its epochs
    long = ','.join(f'layers/attention/query{i}/*' for i in range(8))
    _write(tmp_path / 'c', settings={'train.steps': '400', 'sparsity.update_every': '7', 'sparsity.dense': long})
    (table,) = aggregate.tables(collect([tmp_path])[0])
    assert {group.label: len(group.runs) for group in table.groups} == {
        "sparse_momentum (dense=the model's, update_every=an epoch, steps=4000)": 2,
        f'sparse_momentum (dense={long}, update_every=7, steps=400)': 1,
    }
    write_report(tmp_path)
    checker, content = _page(tmp_path)
    figures = re.findall(r'<svg.*?</svg>', content, re.DOTALL)
    texts = [line for figure in figures for line in re.findall(r'<text[^>]*>(.*?)</text>', figure, re.DOTALL)]
    assert max(map(len, texts)) <= 60 and any(text.endswith('5%') and 'steps=400' in text for text in texts), texts
    checker.feed('')


def test_published_numbers():
    assert published.find('wrn_28_2', 'cifar10', 'dense', 1.0)[0].accuracy == 94.70
    assert published.find('wrn_28_2', 'digits32', 'dense', 1.0) == []
    assert [n.of for n in published.find('wrn_16_8', 'cifar10', 'sparse_momentum', 0.05)] == ['SNIP']


def test_a_run_from_before_a_setting_existed_is_of_its_default(runs):
    path = runs / 'sm' / '0' / 'config.json'
    old = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith(('model.d', 'train.a'))}
    path.write_text(json.dumps(old))
    (table,) = aggregate.tables(collect([runs])[0])
    assert [(group.label, len(group.runs)) for group in table.groups] == [('dense', 3), ('sparse_momentum', 3)]


def test_a_run_is_drawn_beside_its_dense_twin(tmp_path):
    _write(tmp_path / 'sparse', seed=1)
    for name, values in (('other_seed', dict(seed=2)), ('other_rate', dict(seed=1, settings={'optimizer.learning_rate': '0.2'}))):
        _write(tmp_path / name, method='dense', **values)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    assert dense_twin(tmp_path / 'sparse') is None
    _write(tmp_path / 'twin', seed=1, method='dense')
    twin = dense_twin(tmp_path / 'sparse')
    assert twin is not None and twin.folder.name == 'twin' and twin.rows
    assert dense_twin(tmp_path / 'nothing') is None
