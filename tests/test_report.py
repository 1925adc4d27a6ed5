"""studies/report: a study's page and picture, from made-up results. How a browser shows the page: test_browser.py."""

import copy
import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from matplotlib.figure import Figure
from studies.report import write
from studies.report.charts import SETTLED, charts
from studies.report.command import main
from studies.report.page import ReportError, html
from studies.report.words import answer, differences

from tests.helpers import ROOT

HORIZONS = {"adamw": (240, 320, 400), "muon": (160, 265, 400), "dualized": (160, 205, 400)}
SPEED = {"adamw": 1.0, "muon": 1.5, "dualized": 1.95}  # how many of adamw's steps one of theirs is worth
LR = {"adamw": 0.004, "muon": 0.02, "dualized": 4.0}


def results(
    *, names: tuple[str, ...] = ("adamw", "muon", "dualized"), seeds: int = 4, target: float | None = 1.52
) -> dict[str, Any]:
    """A study as studies.speedrun writes it: entries × seeds × 3 horizons, losses by a power law of steps × SPEED."""
    rng = np.random.default_rng(0)

    def interval(values: list[float]) -> dict[str, float | None]:
        mean, half = (
            float(np.mean(values)),
            3.18 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None,
        )
        return {
            "mean": mean,
            "low": None if half is None else mean - half,
            "high": None if half is None else mean + half,
        }

    def entry(name: str) -> dict[str, Any]:
        kind = name if name in SPEED else "adamw"
        speed, pace = SPEED[kind], 0.15 * (1.25 if kind == "dualized" else 1.0)
        runs = []
        for steps in HORIZONS[kind]:
            for seed in range(seeds):
                end = 1.35 + 3.0 * (steps * speed) ** -0.48 + 0.002 * rng.standard_normal()
                at = [0, *range(steps // 10, steps, steps // 10), steps]
                curve = [
                    [
                        s,
                        s * 4096,
                        s * pace,
                        end
                        + 4.0 * (1 - s / steps) ** 1.5 / (1 + 0.03 * s * speed)
                        + 0.004 * rng.standard_normal() * (s < steps),
                    ]
                    for s in at
                ]
                training = [
                    [
                        s,
                        s * 4096,
                        s * pace,
                        float(np.interp(s, at, [c[3] for c in curve])) + 0.04 * rng.standard_normal(),
                    ]
                    for s in range(10, steps + 1, 10)
                ]
                runs.append(
                    {
                        "steps": steps,
                        "seed": seed,
                        "loss": curve[-1][3],
                        "train_seconds": steps * pace,
                        "optimizer_seconds": steps * pace * 0.12,
                        "wall_seconds": steps * pace + 9.5,
                        "peak_memory_bytes": 511_000_000 + seed,
                        "path": f"{name}.s{steps}.seed{seed}",
                        "curve": curve,
                        "training": training,
                    }
                )
        losses = {steps: [r["loss"] for r in runs if r["steps"] == steps] for steps in HORIZONS[kind]}
        statistic = (
            {s: (target - float(np.mean(v))) * math.sqrt(seeds) for s, v in losses.items()}
            if target is not None
            else {}
        )
        to = {"adamw": 400, "muon": 265, "dualized": 205}[kind]
        ones = [r for r in runs if r["steps"] == 400]
        return {
            "name": name,
            "config_path": f"configs/race/{name}.toml",
            "receipt": f"parameter  norm\nhead.weight  {name}",
            "params": 903_424,
            "optimizer_state_bytes": 3_613_696,
            "config": {
                "run.name": name,
                "optim.name": name,
                "optim.lr": LR[kind],
                "model.n_layer": 4,
                "train.steps": 400,
            }
            | ({"optim.beta2": 0.95} if kind == "adamw" else {}),
            "tokens_per_step": 4096,
            "trials": [
                {
                    "values": {"optim.lr": LR[kind] * f},
                    "steps": 400,
                    "seeds": [1000],
                    "losses": [x],
                    "loss": x,
                    "path": [f"tune/{name}.{i}.seed1000"],
                }
                for i, f in enumerate((1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16))
                for x in [None if f > 4 else 1.53 + 0.02 * math.log2(f) ** 2]
            ],
            "tuned": {"optim.lr": LR[kind]},
            "runs": runs,
            "note": "",
            "horizons": [
                {
                    "steps": s,
                    "n": seeds,
                    **interval(v),
                    "statistic": statistic.get(s),
                    "passes": statistic[s] >= 0.004 if statistic else None,
                    "train_seconds": s * pace,
                }
                for s, v in losses.items()
            ],
            "at_budget": {
                "n": seeds,
                "steps": 400,
                "tokens": 400 * 4096,
                "loss": interval(losses[400]),
                "peak_memory_bytes": 511_000_003,
            }
            | {k: interval([r[k] for r in ones]) for k in ("train_seconds", "optimizer_seconds", "wall_seconds")},
            "to_target": None
            if target is None
            else {"steps": to, "tokens": to * 4096, "train_seconds": to * pace, "confirmed": kind != "muon"}
            | (
                {"low": None, "high": None, "interpolated": None}
                if name == "adamw"
                # it sets the target
                else {
                    "low": to - 12 if seeds > 1 else None,
                    "high": to + 15 if seeds > 1 else None,
                    "interpolated": to - 2.7,
                }
            ),
        }

    entries = [entry(name) for name in names]
    pairs = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            d = interval([y["loss"] - x["loss"] for x, y in zip(a["runs"][-seeds:], b["runs"][-seeds:], strict=True)])
            pair = {
                "a": a["name"],
                "b": b["name"],
                "n": seeds,
                "loss_difference": d | {"p": 2.4e-5 if seeds > 1 else None},
                "steps_ratio": None,
                "seconds_ratio": None,
            }
            if target is not None:
                for key, of in (("steps_ratio", "steps"), ("seconds_ratio", "train_seconds")):
                    value = b["to_target"][of] / a["to_target"][of]
                    pair[key] = {
                        "value": value,
                        "low": value * 0.96 if seeds > 1 else None,
                        "high": value * 1.05 if seeds > 1 else None,
                    }
            pairs.append(pair)
    return {
        "schema": 2,
        "command": "python -m studies.speedrun configs/race/adamw.toml configs/race/muon.toml configs/race/dualized.toml --seeds 4 --budget steps=400 --target-entry adamw",
        "name": "race",
        "dataset": "corpora/pysource",
        "corpus_sha256": "9f2c" * 16,
        "track": "pysource-cpu",
        "target": target,
        "target_from": "adamw" if target else None,
        "budget": {"kind": "steps", "value": 400},
        "rule": {"threshold": 0.004, "sigma": 0.00194, "sigma_from": "runs", "level": 0.95},
        "seeds": list(range(seeds)),
        "workers": 2,
        "threads": 1,
        "ranks": 1,
        "hardware": "AMD EPYC 7763, 2 cores",
        "versions": {"python": "3.11.4", "torch": "2.13.0+cpu", "nanodual": "commit 67a4792 (dirty)"},
        "entries": entries,
        "pairs": pairs,
    }


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return results()


@pytest.fixture(scope="module")
def page(study: dict[str, Any]) -> str:
    return html(study)


class Text(HTMLParser):
    """What a reader sees, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:  # void elements have no end
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


# ---- the page


def test_the_page_refers_to_nothing_outside_its_folder(page: str):
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(//" not in page
    allowed = re.compile(r"#[\w.-]+|results\.json|[\w./-]+/(log\.txt|metrics\.jsonl|config\.toml)")
    for tag, attributes in Text(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "xlink:href"):
            assert name not in attributes or allowed.fullmatch(attributes[name] or ""), attributes
    assert "default-src 'none'" in page


def test_the_policy_allows_the_one_script(page: str):
    """The digest is of the script as it stands in the page, or a browser would not run it."""
    import base64
    import hashlib

    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page


def test_every_figure_of_the_results_is_told(study: dict[str, Any], page: str):
    text = Text(page).text
    for e in study["entries"]:
        b, t = e["at_budget"], e["to_target"]
        wanted = [
            f"{b['loss']['mean']:.4f}",
            f"[{b['loss']['low']:.4f}, {b['loss']['high']:.4f}]",
            "the budget"
            if e["name"] == "adamw"
            else f"interpolated {t['interpolated']:.1f} [{t['low']:.1f}, {t['high']:.1f}]",
            f"{t['tokens']:,}",
            f"{t['train_seconds']:.1f} s",
        ]
        wanted += [f"{b[k]['mean']:.1f} s" for k in ("train_seconds", "optimizer_seconds", "wall_seconds")] + [
            "487.3 MiB",
            "903,424",
            "3.4 MiB",
        ]
        wanted += [f"{h[k]:.4f}" for h in e["horizons"] for k in ("mean", "low", "high")] + [
            f"{h['statistic']:+.4f}".replace("-", "−") for h in e["horizons"]
        ]
        wanted += [
            f"{r[k]:.{d}f}"
            for r in e["runs"]
            for k, d in (("loss", 4), ("train_seconds", 1), ("optimizer_seconds", 1), ("wall_seconds", 1))
        ]
        wanted += [f"{x:.4f}" for trial in e["trials"] for x in trial["losses"] if x is not None] + [
            f"optim.lr = {t['values']['optim.lr']:g}" for t in e["trials"]
        ]
        wanted += [e["config_path"], "head.weight", "diverged", "not confirmed", "sets the target"]
        assert [w for w in wanted if w not in text] == []
    for p in study["pairs"]:
        d, s = p["loss_difference"], p["steps_ratio"]
        for w in (
            f"{d['mean']:+.4f}".replace("-", "−"),
            "2.4e-05",
            f"{s['value']:.2f}",
            f"[{s['low']:.2f}, {s['high']:.2f}]",
            f"{p['seconds_ratio']['value']:.2f}",
        ):
            assert w in text, w
    for w in (
        study["command"],
        study["corpus_sha256"],
        study["hardware"],
        "commit 67a4792 (dirty)",
        "0.00194",
        "estimated from the runs",
        "track pysource-cpu",
        "400 steps",
        "these 3 tests are not corrected for their number",
        "2 runs at a time, 1 thread each",
    ):
        assert w in text, w


def test_every_run_and_trial_is_linked_by_a_relative_path(study: dict[str, Any], page: str):
    links = {unquote(a["href"] or "") for tag, a in Text(page).tags if tag == "a"}
    for e in study["entries"]:
        for path in [r["path"] for r in e["runs"]] + [p for t in e["trials"] for p in t["path"]]:
            assert {f"{path}/{name}" for name in ("log.txt", "metrics.jsonl", "config.toml")} <= links
    assert not any(urlsplit(link).scheme or link.startswith("/") for link in links)


def test_ids_are_single_and_links_within_the_page_have_their_target(page: str):
    ids = [a["id"] for _, a in Text(page).tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {
        (a["href"] or "")[1:] for tag, a in Text(page).tags if tag == "a" and (a["href"] or "").startswith("#")
    } <= set(ids)


HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;$_{x}$'


def test_text_of_a_study_stays_text(study: dict[str, Any]):
    bad = copy.deepcopy(study)
    for key in ("name", "command", "dataset", "hardware", "track"):
        bad[key] = HOSTILE
    for e in bad["entries"]:
        e |= {
            "receipt": HOSTILE,
            "note": HOSTILE,
            "config_path": HOSTILE,
            "config": {HOSTILE: HOSTILE},
            "tuned": {HOSTILE: HOSTILE},
        }
        e["trials"] = [
            {"values": {HOSTILE: HOSTILE}, "steps": 4, "seeds": [0], "losses": [1.0], "loss": 1.0, "path": [HOSTILE]}
        ]
        e["runs"][0]["path"] = "javascript:alert(1)//" + HOSTILE
    name = bad["entries"][2]["name"] = HOSTILE
    for p in bad["pairs"]:
        p["b"] = name if p["b"] == "dualized" else p["b"]
    page = Text(html(bad))
    assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in [tag for tag, _ in page.tags]
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert all(not (a.get("href") or "").startswith("javascript:") for _, a in page.tags)
    assert page.text.count(HOSTILE) >= 10


def test_the_data_of_the_charts_cannot_end_their_element(study: dict[str, Any]):
    bad = copy.deepcopy(study)
    bad["entries"][0]["name"] = bad["pairs"][0]["a"] = bad["pairs"][1]["a"] = "</script><b>"
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html(bad), re.DOTALL)
    assert json.loads(data)["entries"][0]["name"] == "</script><b>"


def test_the_same_results_make_the_same_bytes(tmp_path: Path):
    small = results(names=("muon", "dualized"), seeds=2)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert write(small, tmp_path / name) == [tmp_path / name / "report.html", tmp_path / name / "report.png"]
    for name in ("report.html", "report.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_without_script_each_chart_is_a_picture_with_its_lines(study: dict[str, Any], page: str):
    pictures = re.findall(r"<noscript>(.*?)</noscript>", page, re.DOTALL)
    assert len(pictures) == len(charts(study)) == 3
    for svg in pictures:
        assert (
            svg.startswith("<svg") and "<title>" in svg and all(name in svg for name in ("adamw", "muon", "dualized"))
        )
        assert len(re.findall(r"<path ", svg)) > 12


# ---- the charts' data


def test_the_curves_are_every_seed_of_every_horizon_with_its_training(study: dict[str, Any]):
    lines = charts(study)[0]["lines"]
    for loss_of in ("validation", "training batches"):
        shown = [line for line in lines if line["within"][1] == [loss_of] and line["kind"] == "line"]
        assert len(shown) == 3 * 4 * 3
        assert sum("at the budget" in line["within"][0] for line in shown) == 3 * 4
        first = study["entries"][0]["runs"][0]["curve" if loss_of == "validation" else "training"]
        (line,) = [line for line in shown if line["label"] == "adamw, seed 0, 240 steps"]
        np.testing.assert_allclose(line["points"], first, atol=1e-5)  # five decimals are kept


def test_a_band_holds_the_interval_of_the_mean(study: dict[str, Any]):
    """At the end of the budget: that of results.json, to five decimals and the t quantile's three digits there."""
    for i, e in enumerate(study["entries"]):
        (band,) = [line for line in charts(study)[0]["lines"] if line["kind"] == "band" and line["entry"] == i]
        np.testing.assert_allclose(
            band["points"][-1][3:], [e["at_budget"]["loss"][k] for k in ("mean", "low", "high")], atol=2e-5
        )


def test_a_ring_is_where_the_loss_falls_to_what_the_rule_needs(study: dict[str, Any]):
    """(target − mean) · √4 = 0.004 there; none of the entry that sets the target."""
    chart = next(c for c in charts(study) if c["id"] == "horizons")
    goals = {i: e["to_target"]["interpolated"] for i, e in enumerate(study["entries"]) if e["name"] != "adamw"}
    assert {m["entry"]: m["point"] for m in chart["marks"]} == {
        i: [at, study["target"] - 0.002] for i, at in goals.items()
    }
    assert "target − threshold/√n" in chart["about"]


def test_runs_of_several_versions_threads_that_torch_chose_and_ranks_are_told(study: dict[str, Any]):
    several = study["versions"] | {"note": "the judged runs are of 2 versions: commit a; commit b"}
    text = Text(html(study | {"versions": several, "threads": None, "ranks": 4})).text
    assert text.count("the judged runs are of 2 versions: commit a; commit b") == 1
    assert "2 runs at a time, 4 ranks each, torch's choice of threads each." in text


def test_the_first_view_holds_the_later_curves_and_the_target(study: dict[str, Any]):
    low, high = charts(study)[0]["view"]
    late = [p[3] for e in study["entries"] for r in e["runs"] for p in r["curve"] if p[0] >= SETTLED * r["steps"]]
    assert low < min(*late, study["target"]) and high > max(late)
    assert high < max(p[3] for e in study["entries"] for r in e["runs"] for p in r["curve"])


def test_tuned_keys_have_a_chart_each_numbers_by_size_and_words_by_name(study: dict[str, Any]):
    mixed = copy.deepcopy(study)
    for i, trial in enumerate(mixed["entries"][0]["trials"]):
        trial["values"] = {
            "optim.lr": 0.01 * 2**i,
            "optim.direction": ("soap", "adam")[i % 2],
            "optim.cautious": bool(i % 2),
        }
    lr, direction, cautious = charts(mixed)[2:]
    assert lr["x"][0]["log"] and lr["x"][0]["categories"] is None
    assert direction["x"][0]["categories"] == ["adam", "soap"] and cautious["x"][0]["categories"] == ["False", "True"]
    assert [line["kind"] for line in direction["lines"]] == ["dots"]


@pytest.mark.parametrize("name", ["race", "book", "diverged", "no target", "one seed", "one point"])
def test_a_chart_s_caption_explains_every_mark_it_has_and_no_other(name: str, study: dict[str, Any]):
    book = ROOT / "records/pysource-cpu/2026-11-23_nesterov-soap/results.json"
    of = {"race": study, "book": json.loads(book.read_text(encoding="utf-8"))} | sparse()
    for chart in charts(of[name]):
        lines, losses = chart["lines"], [p[-1] for line in chart["lines"] for p in line["points"]]
        explained = {
            "ring": bool(chart["marks"]),
            "×": None in losses,
            "band": any(line["kind"] == "band" for line in lines),
            "Large marks are means with their 95% interval": any(any(line["bars"]) for line in lines),
            "above the frame": chart["id"] == "curves" and any(x is not None and x > chart["view"][1] for x in losses),
        }
        assert {words: words in chart["about"] for words in explained} == explained, chart["id"]


# ---- the answers


def test_an_answer_tells_ratio_interval_confirmation_and_n(study: dict[str, Any]):
    told = answer(study, study["pairs"][1])
    assert (told["a"], told["b"], told["value"], told["interval"]) == ("adamw", "dualized", "0.51", "[0.49, 0.54]")
    assert (
        "dualized reaches 1.52 in 0.51 [0.49, 0.54] times the steps of adamw (205 against 400; dualized confirmed, adamw sets the target)"
        in told["text"]
    )
    assert "both confirmed" in answer(study | {"target_from": None}, study["pairs"][1])["text"]
    assert (
        "p = 2.4e-05, n = 4 seeds, paired" in told["text"] and "lower than adamw's" in told["text"] and told["settled"]
    )
    doubtful = answer(study, study["pairs"][0])
    assert "not confirmed: muon" in doubtful["text"] and not doubtful["settled"]


def test_an_interval_around_equality_is_told_as_no_difference(study: dict[str, Any]):
    pair = copy.deepcopy(study["pairs"][1])
    pair["steps_ratio"] = {"value": 0.98, "low": 0.9, "high": 1.07}
    pair["loss_difference"] = {"mean": -0.001, "low": -0.003, "high": 0.001, "p": 0.2}
    told = answer(study, pair)
    assert (
        "which does not tell the two apart" in told["text"]
        and "no difference of loss can be told" in told["text"]
        and not told["settled"]
    )


def test_an_interval_with_one_end_is_told_with_its_open_side(study: dict[str, Any]):
    pair = copy.deepcopy(study["pairs"][1])
    pair["steps_ratio"] = {"value": 0.5, "low": None, "high": 0.62}
    told = answer(study, pair)
    assert told["interval"] == "[−∞, 0.62]" and told["settled"]
    pair["steps_ratio"]["high"] = 1.1
    assert not answer(study, pair)["settled"]


def test_one_seed_is_told_as_no_evidence():
    alone = results(seeds=1)
    told = answer(alone, alone["pairs"][1])
    assert "n = 1 gives no interval and no test, so this may be chance" in told["text"]
    assert told["interval"] == "" and not told["settled"] and "0.51 times the steps" in told["text"]


def test_a_target_that_one_does_not_reach_is_told(study: dict[str, Any]):
    missed = copy.deepcopy(study)
    missed["entries"][0]["to_target"] = None
    missed["pairs"][1] |= {"steps_ratio": None, "seconds_ratio": None}
    told = answer(missed, missed["pairs"][1])
    assert "dualized reaches 1.52 in 205 steps. No horizon of adamw passes the rule for 1.52." in told["text"]
    assert told["value"].startswith("−0.0") and told["unit"] == "loss of dualized − adamw"
    missed["pairs"][0]["steps_ratio"] = None
    missed["entries"] = [*study["entries"][:1], study["entries"][1] | {"to_target": None}]
    said = answer(missed, missed["pairs"][0])["text"]
    assert said.startswith(
        "No horizon of muon passes the rule for 1.52. adamw reaches 1.52 in 400 steps and sets the target."
    )


def test_an_interval_of_a_lower_loss_is_turned_with_its_sign(study: dict[str, Any]):
    pair = copy.deepcopy(study["pairs"][1])
    for sign, side in ((-1, "lower"), (1, "higher")):
        low, high = sorted((sign * 0.06, sign * 0.08))
        pair["loss_difference"] = {"mean": sign * 0.07, "low": low, "high": high, "p": 1e-4}
        assert f"0.0700 [0.0600, 0.0800] {side} than adamw's (p = 0.0001" in answer(study, pair)["text"]


def test_differences_are_the_keys_that_differ(study: dict[str, Any]):
    varied, shared = differences(study["entries"])
    assert dict(varied) == {
        "optim.name": ['"adamw"', '"muon"', '"dualized"'],
        "optim.lr": ["0.004", "0.02", "4.0"],
        "optim.beta2": ["0.95", "–", "–"],
    }
    assert dict(shared) == {"model.n_layer": "4", "train.steps": "400"}  # run.name is a run's own


# ---- results with less in them


@cache
def sparse() -> dict[str, dict[str, Any]]:
    """Results that lack something, by what."""
    diverged = results()
    for run in diverged["entries"][1]["runs"]:
        run |= {"loss": None, "curve": run["curve"][:3], "optimizer_seconds": None}
    gone = diverged["entries"][1]
    gone["runs"][-1] |= {
        "curve": [],
        "training": [],
        "train_seconds": None,
        "wall_seconds": None,
        "peak_memory_bytes": None,
    }
    gone["horizons"] = [
        h | {"mean": None, "low": None, "high": None, "statistic": None, "passes": False, "train_seconds": None}
        for h in gone["horizons"]
    ]
    nothing = {"mean": None, "low": None, "high": None}
    gone["at_budget"] |= {
        "loss": nothing,
        "train_seconds": nothing,
        "optimizer_seconds": nothing,
        "wall_seconds": nothing,
        "peak_memory_bytes": None,
    }
    gone["to_target"] = None
    for pair in diverged["pairs"]:
        if "muon" in (pair["a"], pair["b"]):
            pair |= {"loss_difference": nothing | {"p": None}, "steps_ratio": None, "seconds_ratio": None}
    untuned = results()
    for e in untuned["entries"]:
        e |= {"trials": [], "tuned": None, "note": "not tuned"}
    untuned |= {"corpus_sha256": None, "track": None}
    flat = results(names=("adamw",))
    for e in flat["entries"]:
        e["horizons"] = e["horizons"][-1:]
        e["runs"] = [
            r | {"loss": 1.5, "curve": [[400, 400 * 4096, 60.0, 1.5]], "training": []}
            for r in e["runs"]
            if r["steps"] == 400
        ]
        e["trials"] = [e["trials"][3], e["trials"][-1] | {"loss": None}]
    long = results(
        names=("a_very_long_name_of_a_configuration_that_nobody_would_choose_but_somebody_has_" * 2, "_hidden", "adamw")
    )
    return {
        "diverged": diverged,
        "no target": results(target=None),
        "one entry": results(names=("adamw",)),
        "six entries": results(names=("adamw", "muon", "dualized", "soap", "scion", "sgd")),
        "nine entries": results(names=tuple(f"entry{i}" for i in range(9))),
        "one seed": results(seeds=1),
        "untuned": untuned,
        "one point": flat,
        "long names": long,
    }


@pytest.mark.parametrize("name", sparse())
def test_results_that_lack_something_have_a_page_and_a_picture(name: str, tmp_path: Path):
    write(sparse()[name], tmp_path)
    text = Text((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert (tmp_path / "report.png").stat().st_size > 10_000  # not an empty figure
    assert not re.search(r"\b(None|nan|inf|NaN|undefined)\b", text)
    assert not re.search(r"[^-−]\[–|, –\]", text)  # half an interval


@pytest.mark.parametrize("name", ["long names", "nine entries", "diverged", "one point"])
def test_a_picture_holds_all_that_is_drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Legend, caption, titles and labels lie within its edges."""
    sizes, save = [], Figure.savefig

    def save_and_measure(figure: Figure, *args: Any, **options: Any) -> None:
        save(figure, *args, **options)
        sizes.append((figure.get_tightbbox(), figure.get_size_inches()))

    monkeypatch.setattr(Figure, "savefig", save_and_measure)
    write(sparse()[name], tmp_path)
    assert len(sizes) == len(charts(sparse()[name])) + 1
    for drawn, (width, height) in sizes:
        assert min(drawn.x0, drawn.y0) >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_numbers_that_are_not_finite_are_runs_that_diverged(tmp_path: Path):
    found = results(names=("adamw",), seeds=2)
    found["entries"][0]["runs"][0]["loss"] = math.inf
    found["entries"][0]["horizons"][0]["mean"] = math.nan
    write(found, tmp_path)
    assert "diverged" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_diverged_run_is_a_cross_where_it_ended():
    lines = [line for line in charts(sparse()["diverged"])[0]["lines"] if line["entry"] == 1]
    assert lines and all(line["points"][-1][3] is None for line in lines)


# ---- the command


def test_the_command_draws_again_from_results_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results.json").write_text(json.dumps(results(names=("adamw",), seeds=1)), encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.html"), str(tmp_path / "report.png")]


def test_the_command_wants_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    allowed = "  allowed: the folder of a study, with its results.json\n  fix: runs/NAME\n"
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: python -m studies.report\n  got: {tmp_path}\n{allowed}"


def test_results_of_another_schema_are_refused(tmp_path: Path):
    with pytest.raises(ReportError, match=r"got: schema 3\n  allowed: 2; 1 in the record book"):
        write(results() | {"schema": 3}, tmp_path)
    with pytest.raises(
        ReportError, match=r"got: schema 1\n.*without lines of training\n  fix: the study's command again"
    ):
        write(results() | {"schema": 1}, tmp_path)


@pytest.mark.parametrize("file", sorted(ROOT.glob("records/*/*/results.json")), ids=lambda f: f.parent.name)
def test_a_study_in_the_record_book_has_a_page(file: Path):
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["name"] in Text(html(found)).text
