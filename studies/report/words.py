"""Numbers and sentences of a report: how each figure is written, and what a pair's results say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

Json = dict[str, Any]
# Settings of a run, not of an entry.
OF_ONE_RUN = ("run.name", "run.dir", "run.seed")


# ---- numbers; None is a value that is not known, or, of a loss, a run that diverged


def as_count(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}"


def as_loss(x: float | None) -> str:
    return "diverged" if x is None else f"{x:.4f}"


def as_signed(x: float) -> str:
    return f"{x:+.4f}".replace("-", "−")


def as_seconds(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f} s" if x >= 1000 else f"{x:.1f} s"


def as_bytes(x: float | None) -> str:
    return "–" if x is None else f"{x / 2**30:.2f} GiB" if x >= 2**30 else f"{x / 2**20:.1f} MiB"


def as_ratio(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}"


def as_p(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}"


def as_target(target: float) -> str:
    return f"{target:.5g}"


def as_level(results: Json) -> str:
    return f"{results['rule']['level']:.0%}"


def as_budget(results: Json) -> str:
    kind, value = results["budget"]["kind"], results["budget"]["value"]
    return f"{value:g} s of training" if kind == "seconds" else f"{value:,.0f} {kind}"


def as_interval(figure: Json, form: Callable[[float], str]) -> str:
    """Return "[low, high]" without the unit, ∞ for an end without a bound; "" if both have none."""
    interval = bounds(figure)
    if interval is None:
        return ""
    ends = [
        form(x).removesuffix(" s") if math.isfinite(x) else "−∞" if x < 0 else "∞" for x in interval
    ]
    return f"[{', '.join(ends)}]"


def as_interpolated(goal: Json) -> str:
    """Return the interpolated horizon and its interval; "" if it is not known.

    The interval is of that horizon and may lie below the horizon that was run.
    """
    x = goal["interpolated"]
    if x is None:
        return ""
    return f"interpolated {x:,.1f} {as_interval(goal, '{:,.1f}'.format)}".strip()


def bounds(figure: Json) -> tuple[float, float] | None:
    """Return (low, high), infinite where a side has no bound; None if neither side has one."""
    low, high = figure["low"], figure["high"]
    if low is None and high is None:
        return None
    return -math.inf if low is None else low, math.inf if high is None else high


def contains(figure: Json, x: float) -> bool:
    """Tell if the figure has an interval and x lies in it."""
    interval = bounds(figure)
    return interval is not None and interval[0] <= x <= interval[1]


# ---- the answer to a pair


def answer(results: Json, pair: Json) -> Json:
    """Return one pair in words.

    value, interval, unit: its headline figure. text: its sentences. settled: the figure's interval
    excludes equality, and runs confirmed the horizons that it compares.
    """
    target, goals = results["target"], {e["name"]: e["to_target"] for e in results["entries"]}
    steps = pair["steps_ratio"] if target is not None else None
    sentences, unconfirmed = [], []
    if steps:
        judged = [name for name in (pair["b"], pair["a"]) if name != results["target_from"]]
        unconfirmed = [name for name in judged if not goals[name]["confirmed"]]
        sentences.append(_ratio_sentence(results, pair, goals, judged, unconfirmed))
    elif target is not None:
        for name in (pair["b"], pair["a"]):
            sets_target = name == results["target_from"]
            sentences.append(_goal_sentence(name, goals[name], target, sets_target=sets_target))
    sentences.append(_loss_sentence(results, pair))
    figure, equality = (steps, 1) if steps else (pair["loss_difference"], 0)
    return {
        "a": pair["a"],
        "b": pair["b"],
        **_headline(pair, steps),
        "text": " ".join(sentences),
        "settled": bounds(figure) is not None
        and not contains(figure, equality)
        and not unconfirmed,
    }


def _headline(pair: Json, steps: Json | None) -> Json:
    """Return value, interval and unit of the ratio of steps, else of the difference of losses."""
    difference = pair["loss_difference"]
    if steps:
        return {
            "value": as_ratio(steps["value"]),
            "interval": as_interval(steps, as_ratio),
            "unit": f"× the steps of {pair['a']}",
        }
    if difference["mean"] is not None:
        return {
            "value": as_signed(difference["mean"]),
            "interval": as_interval(difference, as_signed),
            "unit": f"loss of {pair['b']} − {pair['a']}",
        }
    return {"value": "–", "interval": "", "unit": "no run of both to compare"}


def _ratio_sentence(
    results: Json,
    pair: Json,
    goals: dict[str, Json],
    judged: Sequence[str],
    unconfirmed: Sequence[str],
) -> str:
    """Compare the steps of two entries to the target; `judged` are those that race to it."""
    a, b, steps = pair["a"], pair["b"], pair["steps_ratio"]
    if unconfirmed:
        how = f"not confirmed: {' and '.join(unconfirmed)}"
    else:
        how = f"{'both' if len(judged) == 2 else judged[0]} confirmed"
    if len(judged) < 2:
        how += f", {results['target_from']} sets the target"
    counts = f"{as_count(goals[b]['steps'])} against {as_count(goals[a]['steps'])}"
    sentence = (
        f"{b} reaches {as_target(results['target'])} in {_ratio_with_interval(steps)} times "
        f"the steps of {a} ({counts}; {how})"
    )
    if pair["seconds_ratio"]:
        sentence += f" and in {_ratio_with_interval(pair['seconds_ratio'])} times"
        sentence += " its training seconds"
    return sentence + (", which does not tell the two apart." if contains(steps, 1) else ".")


def _ratio_with_interval(figure: Json) -> str:
    return f"{as_ratio(figure['value'])} {as_interval(figure, as_ratio)}".strip()


def _goal_sentence(name: str, goal: Json | None, target: float, *, sets_target: bool) -> str:
    if not goal:
        return f"No horizon of {name} passes the rule for {as_target(target)}."
    how = " (not confirmed)" if not goal["confirmed"] else ""
    if sets_target:
        how = " and sets the target"
    return f"{name} reaches {as_target(target)} in {as_count(goal['steps'])} steps{how}."


def _loss_sentence(results: Json, pair: Json) -> str:
    """Compare the losses at the budget."""
    a, b, difference = pair["a"], pair["b"], pair["loss_difference"]
    mean, at = difference["mean"], f"At {as_budget(results)}"
    if mean is None:
        return f"{at}, losses cannot be compared: a run diverged."
    size, side = f"{abs(mean):.4f}", "lower" if mean < 0 else "higher"
    if difference["low"] is None:
        return (
            f"{at}, {b}'s loss is {size} {side} than {a}'s; n = {pair['n']} gives no interval "
            "and no test, so this may be chance."
        )
    test = f"p = {as_p(difference['p'])}, n = {pair['n']} seeds, paired"
    if contains(difference, 0):
        return (
            f"{at}, no difference of loss can be told: {b} − {a} = {as_signed(mean)} "
            f"{as_interval(difference, as_signed)} ({test})."
        )
    sign = math.copysign(1, mean)
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    return f"{at}, {b}'s loss is {size} [{low:.4f}, {high:.4f}] {side} than {a}'s ({test})."


# ---- the configurations


def differences(
    entries: Sequence[Json],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the settings that differ and those that all entries share.

    The first are rows (key, each entry's value), the second (key, value).
    """
    keys = {k for e in entries for k in e["config"] if not k.startswith(OF_ONE_RUN)}
    rows = [(key, [_setting(e["config"], key) for e in entries]) for key in sorted(keys)]
    varied = [row for row in rows if len(set(row[1])) > 1]
    shared = [(key, values[0]) for key, values in rows if len(set(values)) == 1]
    return varied, shared


def _setting(config: Json, key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "–"
