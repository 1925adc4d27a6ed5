"""A tree of modules, drawn as text or as a picture: the forward pass from top to bottom."""

from html import escape
from typing import NamedTuple

from .modular import Atom, Bond, Composite, Concat, Module, Power

LINE, LETTER = 20, 7.3  # pixels: the height of a line, the width of a letter of 12-pixel monospace
BAR = 220  # pixels of the largest radius


class Line(NamedTuple):
    """A line of a drawing. depth: its indentation. radii: those of every copy of a weight."""

    depth: int
    text: str
    radii: tuple[float, ...] = ()


def text(tree: Module) -> str:
    """Return the tree as text, with the radii of its weights on the right."""
    rows = lines(tree)
    width = max(2 * depth + len(words) for depth, words, _ in rows)
    drawn = [
        ("  " * depth + words).ljust(width) + (f"  radius {_range(radii)}" if radii else "")
        for depth, words, radii in rows
    ]
    return "\n".join(line.rstrip() for line in drawn)


def svg(tree: Module) -> str:
    """Return the same drawing as a picture (SVG): a bar beside every weight is its radius."""
    rows = lines(tree)
    left = max(2 * depth + len(words) for depth, words, _ in rows) * LETTER + 20
    largest = max((max(radii) for *_, radii in rows if radii), default=1.0) or 1.0
    size = f'width="{left + 420:.0f}" height="{LINE * len(rows) + 20}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (depth, words, radii) in enumerate(rows):
        y = 10 + LINE * i
        out.append(f'<text x="{10 + 2 * depth * LETTER:.0f}" y="{y + 14}">{escape(words)}</text>')
        if radii:
            bar = BAR * max(radii) / largest
            box = f'x="{left:.0f}" y="{y + 4}" width="{bar:.1f}" height="12" fill="#4477aa"'
            out.append(f"<rect {box}/>")
            out.append(f'<text x="{left + bar + 6:.0f}" y="{y + 14}">{_range(radii)}</text>')
    return "\n".join([*out, "</svg>\n"])


def lines(node: Module, radii: tuple[float, ...] = (1.0,)) -> list[Line]:
    """Return the lines of a node. radii: those of its copies."""
    shares = zip(*map(node.targets, radii), strict=True)
    match node:
        case Atom():
            role = f", {node.role}" if node.role != node.name else ""
            words = f"{node.name}: {node.norm}{role}, mass {node.mass:.4g}{_gain(node)}"
            return [Line(0, words, radii)]
        case Bond():
            return [Line(0, node.label + ("" if node.label.startswith("× ") else _gain(node)))]
        case Composite():
            inner, outer = map(lines, (node.inner, node.outer), shares)
            return _after(node, inner, outer)
        case Concat():
            drawn = [Line(0, "side by side")]
            for first, *rest in map(lines, node.children, shares):
                drawn.append(Line(1, f"{'┬' if rest else '─'} {first.text}", first.radii))
                drawn += _indented(rest, 2)
            return drawn
        case Power():
            words = f"{node.times} times (mass {node.mass:.4g}{_gain(node)})"
            copies = tuple(share for radius in radii for share in node.targets(radius))
            return [Line(0, words), *_indented(lines(node.block, copies), 1)]
    return [Line(0, type(node).__name__)]


def _after(node: Composite, inner: list[Line], outer: list[Line]) -> list[Line]:
    """Join the lines of two modules; a bond shares a line with a bond or a sum before it."""
    if isinstance(node.outer, Bond):
        label = outer[0].text
        if isinstance(node.inner, Concat):  # "sum of" instead of "side by side", "add"
            return [Line(0, f"{'sum' if node.outer.label == 'add' else label} of"), *inner[1:]]
        if len(inner) == 1 and not inner[0].radii:  # two bonds on one line
            return [Line(0, f"{inner[0].text}, {label}")]
    return inner + outer


def _indented(rows: list[Line], depth: int) -> list[Line]:
    return [row._replace(depth=row.depth + depth) for row in rows]


def _gain(node: Module) -> str:
    typical = "≈ " * node.typical
    return "" if node.sensitivity == 1 else f", sensitivity {typical}{node.sensitivity:.4g}"


def _range(values: tuple[float, ...]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} … {high}"
