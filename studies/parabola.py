"""Loss against learning rate as a parabola: where its minimum lies, and its value between points.

x: (K,) log₂ learning rates, in octaves. y: (…, K) losses at them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# A parabola is fitted to the five nearest learning rates, none further than so many octaves:
# with rates an octave apart to three, half an octave apart to five.
POINTS, WINDOW = 5, 1.5


class Minimum(NamedTuple):
    """The lowest loss of each curve: its place in octaves and its value.

    least, most: bounds of its place. They are the place itself if the points show a minimum.
    """

    place: Array
    value: Array
    least: Array
    most: Array


def minimum(x: Array, y: Array, diverged: NDArray[np.bool_]) -> Minimum:
    """Return the vertex of the parabola at the lowest point of each curve.

    It is the lowest point itself where the points show no minimum: at an end (unless a parabola of
    five points has its vertex before that end), and where one of the parabola's points diverged.
    Its place then lies between its neighbours, or is unbounded beyond an end.
    x: (K,), y: (…, S, K), diverged: (S, K) → (…, S).
    """
    K = len(x)
    low = y.argmin(-1)
    c = np.clip(low, 1, K - 2)
    beside = np.broadcast_to(diverged, y.shape[-2:]) @ _windows(x).T
    a, b, y0 = _parabola(x, y, c)
    with np.errstate(divide="ignore", invalid="ignore"):
        free = np.where(a > 0, -b / (2 * a), 0.0)
    vertex = np.clip(free, x[c - 1] - x[c], x[c + 1] - x[c])
    # A point at the end that is lowest by chance does not outweigh the others where there are
    # enough of them to fit a parabola, and not only to draw one through them.
    fitted = (a > 0) & (vertex == free) & (_windows(x).sum(1)[c] >= POINTS)
    beside_low = np.take_along_axis(np.broadcast_to(beside, y.shape), low[..., None], -1)[..., 0]
    known = ((low == c) | fitted) & ~beside_low
    place = np.where(known, x[c] + vertex, x[low])
    value = np.where(known, y0 + b * vertex + a * vertex**2, y.min(-1))
    edges = np.concatenate([[-np.inf], x, [np.inf]])
    least, most = (np.where(known, place, edges[low + k]) for k in (0, 2))
    return Minimum(place, value, least, most)


def interpolate(x: Array, y: Array, at: Array) -> Array:
    """Return y at the places `at` (…), by the parabola of the point nearest to each."""
    nearest = np.abs(at[..., None] - x).argmin(-1)
    c = np.clip(nearest, 1, len(x) - 2)
    a, b, y0 = _parabola(x, y, c)
    d = at - x[c]
    return y0 + b * d + a * d**2


def _windows(x: Array) -> NDArray[np.bool_]:
    """Return which points k each parabola at a point c is fitted to: (K, K), [c, k].

    The two neighbours of c always belong to it.
    """
    c, k = np.indices((len(x), len(x)))
    far = np.abs(x[c] - x[k]).round(1)  # rates are written with few digits
    near = far <= np.minimum(WINDOW, np.sort(far)[:, :POINTS][:, -1:])
    return near | (abs(c - k) <= 1)


def _parabola(x: Array, y: Array, c: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Fit the parabola y0 + b (x − x[c]) + a (x − x[c])² at point c, and return (a, b, y0).

    The fit is by least squares. With points an octave apart it goes through the point and its two
    neighbours.
    """
    fits = np.zeros((len(x), 3, len(x)))
    for centre, window in enumerate(_windows(x)):
        if window.sum() >= 3:
            fits[centre][:, window] = np.linalg.pinv(np.vander(x[window] - x[centre], 3))
    coefficients = (fits[c] @ y[..., None])[..., 0]  # (…, 3)
    return coefficients[..., 0], coefficients[..., 1], coefficients[..., 2]
