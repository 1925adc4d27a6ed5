"""What a reader sees of a figure: its words, and whether it is all on the canvas."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def words(figure: Figure) -> str:
    """Every text of the figure, a line each."""
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def check_nothing_is_cut_off(figure: Figure) -> None:
    """All artists lie inside the canvas."""
    box, canvas = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= canvas.x1 and box.y1 <= canvas.y1
