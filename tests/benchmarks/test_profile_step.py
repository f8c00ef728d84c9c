"""The profile of a step accounts for every moment, and tells products from the rest."""

import doctest
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import trace
from benchmarks.steps import profile_step


def test_doctests_of_the_benchmark():
    assert doctest.testmod(profile_step).failed == 0
    assert doctest.testmod(trace).failed == 0


def test_a_real_trace_is_shared_out_among_the_instructions_that_ran(tmp_path):
    @jax.jit
    def step(x, y):
        return jnp.sin(x @ y).sum() + jnp.cos(x).sum()

    x, y = jnp.ones((512, 512)), jnp.ones((512, 512))
    compiled = step.lower(x, y).compile()
    instructions = profile_step.instructions(compiled.as_text(), 1.0)
    compiled(x, y).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        compiled(x, y).block_until_ready()
    ran = trace.events(pathlib.Path(tmp_path), 'jit_step')
    seconds = trace.shares(ran)
    assert set(seconds) <= {*instructions, 'nothing runs'}
    duration = (max(end for _, end, _ in ran) - min(begin for begin, _, _ in ran)) * 1e-9
    assert abs(sum(seconds.values()) - duration) < 1e-6
    products = [row for name, row in instructions.items() if name in seconds and row.kind == 'matrix products']
    assert [row.operations for row in products] == [2 * 512**3]


def test_bars_are_drawn(tmp_path):
    rows = [
        {'kind': 'pooling', 'seconds': 0.002, 'bytes': 1e6, 'operations': 0.0},
        {'kind': 'products', 'seconds': 0.01, 'bytes': 1e6, 'operations': 1e9},
    ]
    profile_step.draw(rows, (2e11, 4e10), 'a step', tmp_path / 'new' / 'profile.png')
    assert (tmp_path / 'new' / 'profile.png').stat().st_size > 5000
    table = profile_step.table(rows, (2e11, 4e10))
    assert '| the step | 12.0 ms | 100% |' in table
