"""CONTRIBUTING.md names only files and make targets that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'CONTRIBUTING.md').read_text()
CODE = re.findall(r'`([^`\n]+)`', PAGE)
PATHS = sorted({word for code in CODE for word in code.split() if re.fullmatch(r'[\w.-]+(/[\w.-]+)*(/|\.\w+)|\.ci/\w+', word)})
TARGETS = sorted({target for code in CODE for target in re.findall(r'^make ([\w./-]+)', code)})


def test_the_page_is_short_and_names_things():
    assert len(PAGE.splitlines()) <= 90
    assert len(PATHS) > 30 and {'sparse_jax/core/methods.py', 'tests/core/test_selection.py', 'launch.py', '.ci/run'} <= {*PATHS}
    assert len(TARGETS) > 5


@pytest.mark.parametrize('path', PATHS)
def test_paths_exist(path):
    assert (ROOT / path).is_dir() if path.endswith('/') else (ROOT / path).is_file()


@pytest.mark.parametrize('target', TARGETS)
def test_make_targets_exist(target):
    makefile = (ROOT / 'Makefile').read_text().replace('$(VENV)', '.venv')
    assert re.search(rf'^{re.escape(target)}:', makefile, re.MULTILINE)


def test_the_rooms_exist_and_are_all_there():
    rule = re.search(r'^ +(core <- .*)$', PAGE, re.MULTILINE)
    assert rule
    rooms = set(re.findall(r'\w+', rule[1])) - {'benchmarks'}
    package = ROOT / 'sparse_jax'
    modules = {p.stem for p in package.glob('*.py') if not p.stem.startswith('_')}
    assert rooms == modules | {p.parent.name for p in package.glob('*/__init__.py')}
