"""The fuzzer's judgement, which must be able to fail a program; and that a seed gives the same programs again."""

import pytest

from tests.fuzz import cases, worker


@pytest.mark.parametrize(('program', 'outcome', 'reason'), [
    ('check_dot(3, 4, 5, density=0.5, dense_gradient=True)', 'right', ''),
    ('sj.sparsify(optax.sgd(0.1), density=2.0, update_every=1, total_steps=2)', 'told', ''),
    ('assert 1 + 1 == 3, "another sum"', 'failed', 'AssertionError at program:1: another sum'),
    ('[][0]', 'failed', 'IndexError at program:1'),
    ('np.zeros(3).reshape(2)', 'failed', 'ValueError at program:1, which is not ours'),
    ('sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=2).init({"a": {}})', 'right', ''),
    ('raise RuntimeError("x")', 'failed', 'RuntimeError'),
])  # fmt: skip
def test_what_is_right_told_and_failed(program, outcome, reason, tmp_path):
    got, why = worker.run(program, tmp_path)
    assert got == outcome and why.startswith(reason) and bool(why) == (outcome == 'failed')
    assert not list(tmp_path.iterdir())


def test_the_names_that_a_message_may_name():
    assert cases.names_in('config.train.steps = 3\nf(density=0.5)') == {'config', 'train', 'steps', 'f', 'density'}


@pytest.mark.parametrize('kind', cases.KINDS)
def test_a_seed_gives_the_same_programs(kind):
    programs = [cases.program(kind, 7, number) for number in range(40)]
    assert programs == [cases.program(kind, 7, number) for number in range(40)]
    assert len(set(programs)) > 20 and programs != [cases.program(kind, 8, number) for number in range(40)]
    for program in programs:
        compile(program, 'program', 'exec')
