"""The share of a step that processes spend on each other: two and four of them on this machine, measured and predicted."""

from sparse_jax.plan import calibrate, collectives
from sparse_jax.plan.hardware import Device


def table(device: Device) -> str:
    """Measured and predicted shares of communication in a step, as Markdown; the device's links were chosen by two processes at 1024."""
    lines = ['| processes, weight | measured share of communication | predicted | difference, points |', '|---|---:|---:|---:|']
    for processes in (2, 4):
        for size in (512, 1024, 2048):
            whole, alone = calibrate.step_of_processes(processes, size)
            sent = collectives.seconds(4 * size * size, processes, device)
            share, expected = max(0.0, 1 - alone / whole), sent / (sent + alone)
            lines.append(f'| {processes}, {size} x {size} | {share:.0%} | {expected:.0%} | {100 * (expected - share):+.0f} |')
    return '\n'.join(lines)
