"""The time model's properties, the search, and what is recommended."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.plan import answers, hardware, memory, numbers, search, step_time
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.step_time import Choice
from tests.plan.networks import planned

DEVICES = hardware.devices()
SLACK = 1 + 1e-9


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(['lenet5', 'wrn', 'lm']),
    device=st.sampled_from(sorted(DEVICES)),
    better=st.sampled_from(['bandwidth', 'link', 'network', 'peak']),
    factor=st.floats(1, 10),
    mesh=st.sampled_from([Mesh(1, 1), Mesh(4, 1), Mesh(2, 2), Mesh(4, 1, True), Mesh(1, 4)]),
)
def test_better_hardware_is_never_slower(name, device, better, factor, mesh):
    before = DEVICES[device]
    value = getattr(before, better)
    improved = {key: v * factor for key, v in value.items()} if better == 'peak' else value * factor
    after = dataclasses.replace(before, **{better: improved})
    seconds = lambda d: step_time.step(planned(name), d, Choice(mesh)).seconds
    assert seconds(after) <= SLACK * seconds(before)


@settings(deadline=None, max_examples=15)
@given(name=st.sampled_from(['wrn', 'lm']), device=st.sampled_from(['A100', 'H100', 'v5e', 'L4']), number=st.integers(1, 9))
def test_one_device_more_never_raises_the_best_time(name, device, number):
    fewer, more = (search.best_of(planned(name), DEVICES[device], n, lambda mesh: True) for n in (number, number + 1))
    best = lambda plan: plan.step.seconds / (1 + 0.02)  # of times that are equal within 2% the simplest plan is taken
    assert best(more) <= SLACK * fewer.step.seconds


@settings(deadline=None, max_examples=15)
@given(device=st.sampled_from(['H100', 'A100', 'cpu']), low=st.floats(0.1, 0.9), step=st.floats(0.01, 0.1))
def test_a_lower_density_is_never_slower(device, low, step):
    network = planned('lm', sparsity__granularity='block:64x64', model__dtype='bfloat16')
    seconds = lambda density: step_time.step(network, DEVICES[device], Choice(Mesh(1, 1)), density).seconds
    # densities of layers are whole blocks, and rates are interpolated between measured ones: allow their steps
    assert seconds(low) <= 1.05 * seconds(low + step)


def test_parts_add_up_and_communication_hides_at_most_as_long_as_there_is_something():
    for mesh in (Mesh(1, 1), Mesh(8, 1), Mesh(8, 1, True), Mesh(2, 4)):
        step = step_time.step(planned('wrn'), DEVICES['A100'], Choice(mesh))
        assert step.seconds == pytest.approx(sum(step.parts().values()))
        assert sum(step.limits().values()) == pytest.approx(1)
        assert step.hidden + step.communication == pytest.approx(step.sent.seconds)
        assert (step.sent.bytes == 0) == (mesh.devices == 1)


def test_blocks_pay_on_hopper_only_and_single_weights_on_no_gpu():
    blocks = planned('lm', sparsity__granularity='block:64x64', model__dtype='bfloat16', model__features=2048, model__heads=16)
    single = planned('lm', model__dtype='bfloat16', model__features=2048, model__heads=16)
    at = lambda network, device: step_time.step(network, DEVICES[device], Choice(Mesh(1, 1)))
    dense = lambda network, device: step_time.step(network, DEVICES[device], Choice(Mesh(1, 1)), 1.0)
    assert at(blocks, 'H200').arithmetic < 0.7 * dense(blocks, 'H200').arithmetic
    for network, device in ((blocks, 'A100'), (blocks, 'v5e'), (single, 'H200')):
        assert at(network, device).arithmetic == dense(network, device).arithmetic


def test_what_does_not_fit_says_what_would_make_it_fit():
    small = DEVICES['L4']
    tiny = dataclasses.replace(small, memory=2e6)
    answer = answers.answer(planned('lm'), tiny, 2)
    assert not answer.plan.fits
    with pytest.raises(ValueError, match='fits on none of these devices: .* needs .* MB of the .* MB of each.*it would take'):
        answers.recommended([answer])
    assert memory.usable(tiny) < tiny.memory


def test_the_cheapest_that_meets_the_deadline_and_the_fastest_without_prices():
    network = planned('wrn')
    priced = {name: dataclasses.replace(DEVICES[name], price=price) for name, price in (('H100', 20.0), ('A100', 1.0))}
    both = [answers.answer(network, priced[name], 4) for name in priced]
    fast, cheap = both
    assert fast.plan.hours < cheap.plan.hours and fast.plan.cost > cheap.plan.cost
    assert answers.recommended(both) is cheap
    between = (fast.plan.hours + cheap.plan.hours) / 2
    assert answers.recommended(both, between).device.name == 'H100'
    relaxed = answers.recommended(both, 1000.0)
    assert relaxed.device.name == 'A100' and relaxed.plan.cost <= cheap.plan.cost and relaxed.plan.hours <= 1000
    with pytest.raises(ValueError, match='--deadline=.*: no devices train it in so many hours; the fastest, . x H100'):
        answers.recommended(both, fast.plan.hours / 2)
    unpriced = [answers.answer(network, DEVICES[name], 4) for name in ('H100', 'A100')]
    assert answers.recommended(unpriced).device.name == 'H100'
    written = json.loads(json.dumps(numbers.as_json(both, cheap)))
    assert written['recommended']['device'] == 'A100' and len(written['devices']) == 2


def test_flags_of_a_plan_are_settings_that_the_launcher_takes():
    from sparse_jax import config as config_lib

    network = planned('lm')
    plan = search.evaluate(network, DEVICES['H100'], Choice(Mesh(2, 2, True), 2, True))
    config = config_lib.Config()
    for flag in plan.flags():
        name, _, value = flag.removeprefix('--config.').partition('=')
        config_lib.override(config, name, value)
    assert (config.mesh.data, config.mesh.model, config.mesh.layout) == (2, 2, 'model+fsdp')
    assert config.train.accumulate == 2 and config.model.remat == 'all'


def test_model_parallelism_sends_less_below_a_batch_of_the_inputs_with_shared_masks_of_the_density_times_that():
    rows = answers.crossover(1000, 500, 0.1, 4, (50, 99, 101, 999, 1001))
    assert [row.model < row.data for row in rows] == [True, True, True, True, False]
    assert [row.model < row.shared_masks for row in rows] == [True, True, False, False, False]


@pytest.mark.parametrize(('number', 'batch', 'used'), [(6, 32, 4), (7, 31, 1), (3, 33, 3)])
def test_a_mesh_divides_the_batch(number, batch, used):
    plan = search.best_of(planned('wrn', data__batch_size=batch), DEVICES['H100'], number, lambda mesh: mesh.model == 1)
    assert plan.devices == used


def test_a_mesh_divides_heads_and_layers_and_compact_storage_is_whole_on_every_device():
    assert not search.divides(planned('lenet300'), Mesh(1, 8)), 'outputs of 300, 100 and 10'
    assert search.divides(planned('lm'), Mesh(1, 4)) and not search.divides(planned('lm'), Mesh(1, 8)), 'four heads'
    assert search.divides(planned('wrn'), Mesh(1, 16)) and search.divides(planned('wrn'), Mesh(16, 1, True))
    compact = planned('lm', sparsity__storage='compact', sparsity__kernels='reference')
    assert not search.divides(compact, Mesh(4, 1, True)) and search.divides(compact, Mesh(4, 1))


def test_attention_writes_its_scores_where_no_kernel_takes_them():
    at = lambda dtype, device: step_time.step(planned('lm', model__dtype=dtype), DEVICES[device], Choice(Mesh(1, 1))).between
    assert at('bfloat16', 'H100') < 0.5 * at('float32', 'H100')
    assert Choice(Mesh(1, 1)).writes_scores(DEVICES['MI300X'], 'bfloat16') and Choice(Mesh(1, 1)).keeps_scores(DEVICES['v5e'])
    deep, shallow = (planned('lm', model__depth=depth) for depth in (8, 2))
    launches = lambda network: step_time.step(network, DEVICES['H100'], Choice(Mesh(1, 1))).launches
    assert launches(deep) > 2.5 * launches(shallow), 'each layer of a loop starts kernels'
