"""Planning by the launcher: what is printed and written, and wrong input in a line."""

import json
import re

import pytest

from tests import launcher

CONFIG = '--config=configs/lm_tiny.py'
PLAN = '--mode=plan'


def test_a_plan_prints_a_recommendation_and_writes_page_and_numbers(tmp_path):
    folder = tmp_path / 'plan'
    done = launcher.launch(
        PLAN, CONFIG, '--devices=4xH100,8xA100', f'--workdir={folder}', '--prices=H100=3,A100=1', '--vocabulary=1000'
    )
    assert done.returncode == 2 and '--vocabulary=1000 has no meaning' in done.stderr, 'the standard library is read by bytes'
    assert not folder.exists()
    done = launcher.launch(PLAN, CONFIG, '--devices=4xH100,8xA100', f'--workdir={folder}', '--prices=H100=3,A100=1')
    assert done.returncode == 0, done.stderr
    assert re.search(r'x (H100|A100), \d data x 1 model.*: [\d,]+ tokens a second, .* for 700 steps, at a cost of', done.stdout)
    assert '- How sure: ' in done.stdout
    page, numbers = (folder / 'plan.html').read_text(), json.loads((folder / 'plan.json').read_text())
    assert [row['device'] for row in numbers['devices']] == ['H100', 'A100']
    assert numbers['recommended'] in numbers['devices']
    assert page.count('<svg') == 6 and 'prefers-color-scheme: dark' in page and 'http-equiv' not in page
    assert 'Predicted loss' not in page and 'Loss by density' in page
    assert sorted(path.name for path in folder.iterdir()) == ['plan.html', 'plan.json']


def test_a_plan_without_a_folder_writes_nothing_and_of_unknown_data_says_what_it_assumes(tmp_path):
    done = launcher.launch(PLAN, '--config=configs/lm_350m.py', '--devices=8xH100', '--vocabulary=32000')
    assert done.returncode == 0 and 'is taken to have' not in done.stdout, done.stderr
    done = launcher.launch(PLAN, '--config=configs/imagenet_resnet50.py:partially_dense', '--devices=1xA100', '--deadline=100')
    assert done.returncode == 0, done.stderr
    assert '- The data is taken to have 1,281,167 images of 224x224 pixels in 1,000 classes' in done.stdout


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--devices=8xH10'], "--devices='H10' does not exist. Did you mean 'H100'"),
        ([], '--devices is missing: give for instance --devices=8xH100'),
        (['--devices=8xH100', '--prices=H100'], '--prices=H100: must be DEVICE=PRICE an hour'),
        (['--devices=8xH100', '--prices=X9=1'], "'X9' does not exist"),
        (['--devices=8xH100', '--deadline=0'], '--deadline=0: must be hours, above 0'),
        (['--devices=8xH100', '--deadline=1e-9'], '--deadline=1e-09: no devices train it'),
        (['--devices=8xH100', '--hardware=missing.json'], '--hardware=missing.json cannot be read'),
        (['--devices=8xH100', '--jobs=2'], '--jobs has no meaning with --mode=plan'),
        (
            ['--devices=1xL4', '--config.model.features=8192', '--config.model.heads=64', '--config.model.depth=8'],
            'config.model: the network fits on none of these devices',
        ),
    ],
)
def test_wrong_input_is_told_in_a_line(flags, message):
    done = launcher.launch(PLAN, CONFIG, *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_flags_of_plans_have_no_meaning_elsewhere(tmp_path):
    done = launcher.launch('--mode=train', CONFIG, f'--workdir={tmp_path / "run"}', '--devices=8xH100')
    assert done.returncode == 2 and '--devices has no meaning with --mode=train' in done.stderr


def test_a_file_in_the_place_of_the_folder_no_config_and_what_the_compiler_says(tmp_path):
    (tmp_path / 'file').write_text('')
    done = launcher.launch(PLAN, CONFIG, '--devices=8xH100', f'--workdir={tmp_path / "file"}')
    assert done.returncode == 2 and 'is a file: give a folder' in done.stderr
    done = launcher.launch(PLAN, f'--workdir={tmp_path / "new"}', '--devices=8xH100')
    assert done.returncode == 2 and '--config is missing' in done.stderr and 'workdir of a run' not in done.stderr
    done = launcher.launch(PLAN, CONFIG, '--devices=2xH100', '--exact')
    assert done.returncode == 0 and re.search(r'^exact:   ', done.stdout, re.MULTILINE), done.stderr
