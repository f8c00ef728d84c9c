"""A plan as numbers for programs."""

import dataclasses
from collections.abc import Mapping, Sequence

from sparse_jax.plan.answers import Answer
from sparse_jax.plan.collectives import Mesh


def as_json(answers: Sequence[Answer], chosen: Answer) -> Mapping:
    """All numbers, for programs."""
    return {'recommended': _json_of(chosen), 'devices': [_json_of(a) for a in answers]}


def _json_of(answer: Answer) -> dict:
    plan = answer.plan
    mesh: Mesh = plan.choice.mesh
    return {
        'device': answer.device.name,
        'devices': answer.number,
        'used': plan.devices,
        'mesh': {'data': mesh.data, 'model': mesh.model, 'fully_sharded': mesh.sharded},
        'accumulate': plan.choice.accumulate,
        'remat': plan.choice.remat,
        'fits': plan.fits,
        'seconds_a_step': plan.step.seconds,
        'parts_of_a_step': plan.step.parts(),
        'limits': plan.step.limits(),
        'hidden_communication': plan.step.hidden,
        'bytes_sent': plan.step.sent.bytes,
        'throughput': plan.throughput,
        'unit': f'{plan.network.unit}/s',
        'hours': plan.hours,
        'cost': plan.cost,
        'kilowatt_hours': plan.energy,
        'utilization': plan.utilization,
        'memory': dataclasses.asdict(plan.memory) | {'peak': plan.memory.peak},
        'dense_seconds_a_step': answer.dense_seconds,
        'pays_below_density': answer.pays_below,
        'by_density': [point._asdict() for point in answer.by_density],
        'by_number': [{'devices': p.devices, 'seconds_a_step': p.step.seconds, 'cost': p.cost} for p in answer.by_number],
        'flags': plan.flags(),
        'source': answer.device.source,
    }
