"""Draws ``chain.png``: a weight, three links and the knots between them.

python docs/figures/chain.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FROZEN, INK = "#d5dae1", "#1f2933"
LINKS = ["#e07b39", "#2a7f9e", "#7a4fa3"]
SIZE, THIN, STEP = 1.8, 0.5, 5.7  # of a weight, of a rank, from one link to the next


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str, text_color: str = "white") -> None:
    """A matrix with its name inside."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=text_color, fontsize=15)


def weight(axes: Axes, x: float, n_merged: int) -> None:
    """The frozen weight, with a band for each link that is merged into it."""
    box(axes, x, 0, SIZE, SIZE, FROZEN, "", INK)
    axes.text(x + SIZE / 2 + 0.12 * n_merged, SIZE / 2, f"$W_{n_merged}$", ha="center", va="center", color=INK, fontsize=15)
    for place, color in enumerate(LINKS[:n_merged]):
        axes.add_patch(Rectangle((x + 0.1 + 0.2 * place, 0.1), 0.12, SIZE - 0.2, facecolor=color))


def link(axes: Axes, x: float, index: int) -> None:
    """The current link: a tall B and a wide A."""
    axes.text(x - 0.36, SIZE / 2, "+", ha="center", va="center", fontsize=19, color=INK)
    box(axes, x, 0, THIN, SIZE, LINKS[index], f"$B_{index}$")
    box(axes, x + THIN + 0.1, SIZE - THIN, 1.25, THIN, LINKS[index], f"$A_{index}$")
    axes.text(x + 1.25, 0.6, "trained", ha="center", va="center", fontsize=13, color=LINKS[index])


def draw(path: Path) -> None:
    """Three links from left to right, then the plain weight."""
    figure = Figure(figsize=(10.8, 2.75))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.005, 0, 0.99, 1))
    for index in range(3):
        x = index * STEP
        axes.text(x + 2.1, 2.2, f"link {index}", ha="center", fontsize=17, color=LINKS[index], weight="bold")
        weight(axes, x, index)
        link(axes, x + SIZE + 0.7, index)
        start, end = x + 4.5, x + STEP - 0.1
        axes.add_patch(FancyArrowPatch((start, 0.9), (end, 0.9), arrowstyle="-|>", mutation_scale=18, color=INK, linewidth=1.6))
        axes.text((start + end) / 2, 0.9 + 0.27, "knot" if index < 2 else "merge", ha="center", fontsize=13, color=INK)
    axes.text(3 * STEP + SIZE / 2, 2.2, "result", ha="center", fontsize=17, color=INK, weight="bold")
    weight(axes, 3 * STEP, 3)
    rule = r"knot:  $W_{k+1} = W_k + \frac{\alpha}{r}\,B_k A_k$,  then a new random $A$, $B = 0$, a new optimizer"
    axes.text(0, -0.65, rule, ha="left", va="center", fontsize=14.5, color=INK)
    axes.text(3 * STEP + SIZE, -0.65, r"rank of the sum $\leq 3r$", ha="right", va="center", fontsize=14.5, color=INK)
    axes.set_xlim(-0.1, 3 * STEP + SIZE + 0.1)
    axes.set_ylim(-1.1, 2.65)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, dpi=130, facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_name("chain.png"))
