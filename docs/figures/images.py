"""Draws pictures with their labels and predictions, from a file of predictions.

python docs/figures/images.py predictions.jsonl images.png
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

ROWS, COLUMNS = 2, 10


def draw(predictions: Path, path: Path) -> None:
    """Draws a row with right predictions, and one with wrong ones, spread over the file.

    Args:
        predictions: the file that ``cola predict`` has written.
        path: the figure's file.
    """
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    right = [line for line in lines if line["prediction"] == line["target"]]
    wrong = [line for line in lines if line["prediction"] != line["target"]]
    figure = Figure(figsize=(COLUMNS, ROWS * 1.35), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (title, chosen) in enumerate((("right", right), ("wrong", wrong))):
        for column, line in enumerate(chosen[:: max(1, len(chosen) // COLUMNS)][:COLUMNS]):
            axes = figure.add_subplot(ROWS, COLUMNS, row * COLUMNS + column + 1)
            axes.imshow(imread(line["image"]), cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{line['target']} → {line['prediction']}", color="#2a7f9e" if title == "right" else "#c0392b")
            axes.axis("off")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
