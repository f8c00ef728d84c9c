"""The package's structure: imports run downward, without a circle, and the front door shows the public names and nothing else."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import sparse_jax as sj
from sparse_jax.core import masks as core_masks

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'sparse_jax'

# A room imports from itself and from those with a lower number.
FLOORS = {
    '_malloc': -1, 'core': 0, 'stats': 1, 'kernels': 1, 'sharding': 2, 'compact': 2, 'export': 2, 'nnx': 2, 'models': 3, 'data': 3, 'config': 4, 'runtime': 5, 'train': 6, 'configs': 5, 'aot': 7, 'report': 7, 'plan': 8, 'launch': 9,
}  # fmt: skip
# Outside of what its row allows a library is imported by nobody.
LIBRARIES = {
    'flax': {'models', 'nnx'}, 'orbax': {'runtime'}, 'grain': {'data'}, 'rich': {'train', 'report', 'aot', 'plan'}, 'matplotlib': {'report'},
    'scipy': {'report', 'export'}, 'safetensors': {'export'}, 'tensorboardX': {'train'}, 'tokenizers': {'data'}, 'mlxtend': {'data'}, 'absl': {'launch'}, 'ml_collections': {'launch'},
}  # fmt: skip


def _modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for path in sorted([*PACKAGE.rglob('*.py'), *(PACKAGE / 'configs').glob('*.py')]):  # configs is a link to the folder beside
        parts = path.relative_to(ROOT).with_suffix('').parts
        names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return names


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """What a module imports, at its top and within functions."""
    imported = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name}: relative imports are not used'
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                imported.add(whole if whole in MODULES else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'importlib.import_module' and '.' in name:
            # lazily, by a name whose first part is only known when it runs: any module of its room that the name may mean
            name_of_module = re.sub(r'\\{.*?\\}', '.*', re.escape(ast.unparse(node.args[0]).lstrip('f').strip('\'"')))
            imported |= {module for module in MODULES if re.fullmatch(name_of_module, module) and _room(module) == _room(name)}
    return imported


def _room(name: str) -> str:
    return name.split('.')[1]


def test_every_room_has_a_floor():
    assert {_room(name) for name in MODULES if '.' in name} - {'_version'} == set(FLOORS)


@pytest.mark.parametrize('room', FLOORS)
def test_imports_run_downward(room):
    for name in (n for n in MODULES if '.' in n and _room(n) == room):
        for imported in _imports(name):
            assert imported != 'sparse_jax', f'{name} imports its own front door'
            if imported.startswith('sparse_jax.'):
                other = _room(imported)
                assert other == room or FLOORS[other] < FLOORS[room], f'{name} imports {imported}'
            library = imported.partition('.')[0]
            assert room in LIBRARIES.get(library, {room}), f'{name} imports {library}'
            assert room != 'core' or library in {'sparse_jax', 'jax', 'optax', 'numpy', *sys.stdlib_module_names}, (
                f'{name} imports {library}'
            )


def test_there_is_no_circle():
    graph = {name: {i for i in _imports(name) if i in MODULES and i != name} for name in MODULES if name != 'sparse_jax'}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, ' -> '.join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    assert 'sparse_jax.kernels.gpu.operations' in graph['sparse_jax.kernels.backend'], 'lazy imports are seen'
    for name in sorted(graph):
        visit(name, ())


def test_the_front_door_shows_the_public_names_and_nothing_else():
    assert dir(sj) == sorted(sj.__all__) and len(set(sj.__all__)) == len(sj.__all__)
    assert all(getattr(sj, name) is not None for name in sj.__all__)
    with pytest.raises(AttributeError, match='has no attribute .transforms.'):
        _ = sj.transforms


def test_modules_are_imported_by_their_public_paths_too():
    program = """
from sparse_jax.criteria import magnitude
import sparse_jax.redistribution as redistribution
import sparse_jax as sj
assert magnitude is sj.criteria.magnitude and redistribution is sj.redistribution
"""
    subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
    for name in (
        'criteria',
        'distributions',
        'granularity',
        'masks',
        'methods',
        'momentum',
        'redistribution',
        'schedules',
        'selection',
    ):
        by_path, module = importlib.import_module(f'sparse_jax.{name}'), getattr(sj, name, core_masks)
        names = [attribute for attribute in dir(module) if not attribute.startswith('_')]
        assert dir(by_path) == dir(module) and all(getattr(by_path, name) is getattr(module, name) for name in names)


def test_nothing_is_imported_before_it_is_used():
    program = 'import sys, sparse_jax, sparse_jax.config, sparse_jax.launch; print(sys.modules.keys() & {"jax", "numpy", "absl"})'
    done = subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'set()\n'
