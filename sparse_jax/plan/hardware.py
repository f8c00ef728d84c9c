"""Devices as data: what a vendor's sheet says of them, with its source and date, and what was measured of them.

Peaks are of dense products: vendors print twice that, for 2:4 sparsity. A file of one's own adds devices, prices or corrections, in the same
format as ``devices.json`` beside this file.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from sparse_jax.core import errors

_FILE = pathlib.Path(__file__).with_name('devices.json')
# A tensor core's share of its peak, a copy's of the bandwidth, and a kernel's start, where nothing was measured.
_USUAL = {
    'gpu': dict(products=0.55, convolutions=0.4, network=1.0, bandwidth=0.83, between=1.0, lanes=1.0, optimizer=1.0, links=0.75)
    | dict(overlap=0.8, launch_us=3.0, collective_us=10.0),
    'tpu': dict(products=0.8, convolutions=0.55, network=1.0, bandwidth=0.85, between=1.0, lanes=1.0, optimizer=1.0, links=0.8)
    | dict(overlap=0.85, launch_us=1.0, collective_us=5.0),
    'cpu': dict(products=0.6, convolutions=0.9, network=0.85, bandwidth=1.0, between=0.24, lanes=1.5, optimizer=0.5, links=1.0)
    | dict(overlap=0.0, launch_us=50.0, collective_us=500.0),
}


@dataclasses.dataclass(frozen=True, eq=False)  # what is computed of one is kept by which it is
class Device:
    """One device of a kind.

    Attributes:
      name: short, as ``--devices`` takes it.
      title: as its vendor calls it.
      kind: gpu, tpu or cpu.
      peak: dense operations a second by type (two for a multiply-add).
      memory: bytes.
      bandwidth: bytes a second.
      cache: bytes of the last cache.
      link: bytes a second to the other devices of a host (of a TPU: of its pod), each way.
      per_host: devices of a host (of a TPU: of a pod).
      network: bytes a second to other hosts, a device.
      watts: of the device; None: not published.
      price: an hour, in any currency; None: not given.
      efficiency: parts of the peak that single products and convolutions reach, and whole networks of that; parts of the bandwidth,
        and of that what runs between products reaches (of images by lanes: lanes) and the optimizer; parts of the links; the part of the
        backward pass that communication hides behind; microseconds of a launch and of a collective.
      sparse: of CPUs: the part of the peak that sparse kernels reach on existing weights, as pairs (density, part), of products and
        convolutions.
      fitted_on: the trainings that these were chosen by; empty: none, they are those of its kind.
      aliases: other names of it.
      has_blocks: whether kernels of this package multiply by blocks on it.
      source: where the figures are from, and their date.
    """

    name: str
    title: str
    kind: str
    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    cache: float
    link: float
    per_host: int
    network: float
    watts: float | None
    price: float | None
    efficiency: Mapping[str, float]
    sparse: Mapping[str, tuple[tuple[float, float], ...]]
    fitted_on: str
    aliases: tuple[str, ...]
    has_blocks: bool
    source: str

    def operations(self, dtype: str) -> float:
        """The peak of a type: of float32 as XLA multiplies it, by tensor cores where there are such."""
        for name in ('tf32' if dtype == 'float32' else dtype, 'bfloat16' if dtype != 'float32' else 'float32', 'float32'):
            if name in self.peak:
                return self.peak[name]
        return max(self.peak.values())


@functools.cache
def _shipped() -> dict[str, Any]:
    return json.loads(_FILE.read_text())


def devices(own: pathlib.Path | None = None, prices: Mapping[str, float] | None = None) -> dict[str, Device]:
    """All known devices.

    Args:
      own: a file with more of them, or with corrections, in the format of devices.json.
      prices: an hour of a device, by its name, in any currency.

    Returns:
      Devices by name.

    Raises:
      ValueError: for a file or a price that cannot be used.

    Example:
      >>> devices()['H100'].operations('bfloat16') / 1e12
      989.4
    """
    rows = dict(_shipped())
    if own is not None:
        try:
            added = json.loads(own.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f'--hardware={own} cannot be read ({error}).') from error
        if not isinstance(added, dict) or not all(isinstance(row, dict) for row in added.values()):
            raise ValueError(f'--hardware={own}: must hold an object of devices by name, as sparse_jax/plan/devices.json does.')
        for name, row in added.items():
            known = rows.get(name, {})
            rows[name] = known | row
            for table in ('efficiency', 'sparse', 'dense_tflops'):  # what is not named keeps its value
                if isinstance(row.get(table), dict) and table in known:
                    rows[name][table] = known[table] | row[table]
    made = {name: _device(name, row) for name, row in rows.items()}
    for name, price in (prices or {}).items():
        found = find(name, made)
        made[found.name] = dataclasses.replace(found, price=price)
    return made


_NUMBERS = {
    'memory_gb': 0,
    'bandwidth_gb_s': 0,
    'cache_mb': None,
    'link_gb_s': None,
    'network_gb_s': None,
    'price': None,
    'watts': None,
}
_COUNTS = ('devices_per_host', 'pod')
_TEXTS = ('title', 'link', 'source', 'date', 'network_source', 'fitted_on')
_OTHERS = ('kind', 'dense_tflops', 'aliases', 'blocks', 'efficiency', 'sparse')


def _check(name: str, row: Mapping[str, Any]) -> None:
    """Raises ValueError for a row that is not whole, or has a wrong value or a name that does not exist."""
    if missing := [key for key in ('kind', 'dense_tflops', 'memory_gb', 'bandwidth_gb_s') if key not in row]:
        raise ValueError(f'--hardware: {name} lacks {", ".join(missing)}.')
    is_number = lambda value, low: (
        isinstance(value, int | float) and not isinstance(value, bool) and (value > 0 if low == 0 else value >= 0)
    )
    for key, value in row.items():
        if key not in (*_NUMBERS, *_COUNTS, *_TEXTS, *_OTHERS):
            raise errors.unknown(f'--hardware: the figure of {name}', key, [*_NUMBERS, *_COUNTS, *_TEXTS, *_OTHERS])
        if key in _NUMBERS and not (is_number(value, _NUMBERS[key]) or (value is None and key in ('price', 'watts'))):
            raise ValueError(
                f'--hardware: {key} of {name} is {value!r}: must be a number{" above 0" if _NUMBERS[key] == 0 else ", at least 0"}.'
            )
        if key in _COUNTS and not (isinstance(value, int) and value >= 1):
            raise ValueError(f'--hardware: {key} of {name} is {value!r}: must be a whole number, at least 1.')
    if row['kind'] not in tuple(_USUAL):
        raise errors.unknown(f'--hardware: the kind of {name}', row['kind'], _USUAL)
    for key in ('dense_tflops', 'efficiency'):
        table = row.get(key, {})
        if (
            not isinstance(table, dict)
            or not all(is_number(value, None) for value in table.values())
            or (key == 'dense_tflops' and not table)
        ):
            raise ValueError(f'--hardware: {key} of {name} is {table!r}: must be numbers by name, such as {{"bfloat16": 312}}.')
    sparse = row.get('sparse', {})
    pairs = [
        pair
        for pairs in (sparse.values() if isinstance(sparse, dict) else [None])
        for pair in (pairs if isinstance(pairs, list) else [None])
    ]
    if (
        not isinstance(sparse, dict)
        or set(sparse) not in (set(), {'products', 'convolutions'})
        or not all(isinstance(pair, list) and len(pair) == 2 and all(is_number(v, 0) for v in pair) for pair in pairs)
    ):
        raise ValueError(
            f'--hardware: sparse of {name} must have pairs [density, part of the peak] under products and convolutions.'
        )


def _device(name: str, row: Mapping[str, Any]) -> Device:
    _check(name, row)
    gb = 1e9
    is_pod = row['kind'] == 'tpu'
    return Device(
        name=name,
        title=row.get('title', name),
        kind=row['kind'],
        peak={dtype: 1e12 * value for dtype, value in row['dense_tflops'].items()},
        memory=row['memory_gb'] * gb,
        bandwidth=row['bandwidth_gb_s'] * gb,
        cache=row.get('cache_mb', 0) * 1e6,
        link=row.get('link_gb_s', 0) * gb,
        per_host=row.get('pod', 1) if is_pod else row.get('devices_per_host', 1),
        network=row.get('network_gb_s', 0) * gb,
        watts=row.get('watts'),
        price=row.get('price'),
        efficiency=_USUAL[row['kind']] | row.get('efficiency', {}),
        sparse={name: tuple((d, e) for d, e in pairs) for name, pairs in row.get('sparse', {}).items()},
        fitted_on=row.get('fitted_on', ''),
        aliases=tuple(row.get('aliases', ())),
        has_blocks=row.get('blocks', False),
        source=f'{row.get("source", "yours")}, {row.get("date", "no date")}',
    )


def find(name: str, known: Mapping[str, Device]) -> Device:
    """The device of that name or alias, whatever its case; ValueError with the nearest names where there is none."""
    plain = lambda text: re.sub(r'[^a-z0-9]', '', text.lower())
    names = {plain(alias): key for key, device in known.items() for alias in device.aliases} | {plain(key): key for key in known}
    if plain(name) not in names:
        raise errors.unknown('--devices', name, known)
    return known[names[plain(name)]]


def parse(text: str, known: Mapping[str, Device]) -> list[tuple[int, Device]]:
    """What ``--devices`` names: ``8xH100,16xv5e``; ValueError for anything else.

    >>> [(number, device.name) for number, device in parse('8xH100,v5e', devices())]
    [(8, 'H100'), (1, 'v5e')]
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(','))):
        match = re.fullmatch(r'(?:(\d+)\s*[x*]\s*)?(.+)', part)
        assert match is not None
        number = int(match[1] or 1)
        if number < 1:
            raise ValueError(f'--devices={part}: must be at least one.')
        device = find(match[2], known)
        if number > 1 and not device.link:
            raise ValueError(
                f'--devices={part}: {device.name} has no link_gb_s, bytes a second between devices: name it in --hardware.'
            )
        found.append((number, device))
    if not found:
        raise ValueError('--devices is empty: name devices, such as 8xH100,16xv5e.')
    return found
