"""How entries are told apart: colours, dashes and markers, the same for script and matplotlib."""

# Okabe & Ito's palette, which the colour-blind tell apart (jfly.uni-koeln.de/color), in an order
# by brightness on each ground. Entries differ in dash and marker too.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
DARK = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#AAAAAA")
DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3), (12, 4), (5, 2, 1, 2, 1, 2))
# The script's names, and matplotlib's.
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P"}


def dash(entry: int) -> tuple[int, ...]:
    """Return the lengths of an entry's strokes and gaps; () for a solid line."""
    return DASHES[entry % len(DASHES)]


def marker(entry: int) -> str:
    """Return the script's name of an entry's marker."""
    return list(MARKERS)[entry % len(MARKERS)]
