"""What ran when, by instruction of a compiled program, from a trace of jax.profiler."""

import collections
import pathlib

import jax


def events(folder: pathlib.Path, module: str) -> list[tuple[float, float, str]]:
    """Reads a trace.

    Args:
      folder: that ``jax.profiler.trace`` wrote, once.
      module: name of the compiled program, such as 'jit_train_step'.

    Returns:
      Begin, end (ns) and name of each instruction that ran, in order. On a GPU: of each kernel, by its own clock.
    """
    (path,) = folder.glob('**/*.xplane.pb')
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    streams = [x for plane in planes if plane.name.startswith('/device:GPU') for x in plane.lines if x.name.startswith('Stream')]
    ran = []
    for line in streams or (line for plane in planes for line in plane.lines):
        starts, ends = {}, []
        for event in line.events:
            stats = dict(event.stats)
            if event.name.startswith('end: '):
                ends.append((stats.get('_c'), event.start_ns + event.duration_ns))
            elif stats.get('hlo_module') == module:
                # an instruction that several threads of a CPU share has a flow, which ends where the last of them does
                flow = stats.get('_p', f'alone {len(starts)}')
                starts[flow] = event.start_ns, event.start_ns + event.duration_ns, str(stats['hlo_op'])
        ends = dict(ends)
        ran += [(begin, max(end, ends.get(key, end)), name) for key, (begin, end, name) in starts.items()]
    return sorted(ran)


def shares(ran: list[tuple[float, float, str]]) -> dict[str, float]:
    """Returns seconds by name: each moment is divided equally among what runs in it, or counts as 'nothing runs'.

    >>> {name: round(s * 1e9, 3) for name, s in sorted(shares([(0, 10, 'a'), (5, 15, 'b'), (20, 30, 'a')]).items())}
    {'a': 17.5, 'b': 7.5, 'nothing runs': 5.0}
    """
    marks = sorted([(begin, 1, name) for begin, _, name in ran] + [(end, -1, name) for _, end, name in ran])
    running: collections.Counter[str] = collections.Counter()
    seconds: dict[str, float] = {}
    last = marks[0][0] if marks else 0.0
    for time, change, name in marks:
        names = [n for n, count in running.items() for _ in range(count)]
        for n in names or ['nothing runs']:
            seconds[n] = seconds.get(n, 0.0) + (time - last) * 1e-9 / max(1, len(names))
        running[name] += change
        last = time
    return {name: s for name, s in seconds.items() if s}
