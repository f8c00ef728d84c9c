"""The rounds of lottery tickets as a picture."""

import json
import pathlib


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Draws a folder's lottery.json: the result of each round by its density, and what all rounds up to it cost.

    Args:
      folder: workdir of ``--mode=lottery``, finished.

    Returns:
      The picture's path, ``lottery.png`` in the folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = json.loads((folder / 'lottery.json').read_text())['rounds']
    is_text = 'nats' in rows[0]['result']
    density, score = [100 * row['density'] for row in rows], [row['score'] * (1 if is_text else 100) for row in rows]
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.axhline(score[0], color='gray', linestyle='--', label='dense')
    left.plot(density[1:], score[1:], marker='o', color='C0', label='rounds')
    left.set_ylabel('validation loss, nats a token' if is_text else 'test accuracy %')
    left.legend(frameon=False)
    right.plot(density[1:], [row['operations'] / rows[0]['operations'] for row in rows[1:]], marker='o', color='C1')
    right.axhline(1, color='gray', linestyle='--')
    right.set_ylabel('operations of all trainings, dense = 1')
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale('log')
        axes.invert_xaxis()
        axes.set_xlabel('density')
        axes.minorticks_off()
        axes.set_xticks(density[1:], [f'{x:.3g}%' for x in density[1:]])
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    path = folder / 'lottery.png'
    figure.savefig(path, dpi=120)
    return path
