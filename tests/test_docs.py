"""The documents: links lead somewhere, lines fit, README's figures are those of the record."""

import json
import re
from pathlib import Path

import pytest
from studies import readme_picture

from tests.helpers import ROOT

WIDTH, README_LINES = 100, 180
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / folder / name for folder, name in (("benchmarks", "RESULTS.md"), ("examples", "README.md"))),
]
PRINTED = {"docs/settings.md"}  # by python -m training.help


def prose(text: str) -> str:
    """Return the text without blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """Return the fragments of a page's headings; a repeated one gets a number, as GitHub's do."""
    seen: dict[str, int] = {}
    fragments = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE):
        fragment = anchor(heading)
        fragments.add(f"{fragment}-{seen[fragment]}" if fragment in seen else fragment)
        seen[fragment] = seen.get(fragment, 0) + 1
    return fragments


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file_and_a_heading(path: Path):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        file, _, fragment = target.partition("#")
        page = path.parent / file if file else path
        if not page.exists() or (fragment and fragment not in anchors(page)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if relative(p) not in PRINTED], ids=relative)
def test_prose_has_at_most_100_columns(path: Path):
    """Tables, pictures and what a program printed stay on one line; addresses of links do not count."""
    lines = re.sub(r"\]\([^)\s]+\)", "]", prose(path.read_text(encoding="utf-8"))).splitlines()
    printed = re.compile(r"\||!\[|    |- [\d.]+[MBT]: ")  # the last are of docs/scaling.md
    assert [line for line in lines if len(line) > WIDTH and not printed.match(line)] == []


def test_readme_is_read_in_one_sitting():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > WIDTH] == []


def test_readme_says_of_the_record_what_its_results_say():
    study = json.loads(readme_picture.RESULTS.read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    pairs = {(pair["a"], pair["b"]): pair for pair in study["pairs"]}
    for versus in ("adamw", "muon"):
        ratio = pairs[versus, "dualized"]["steps_ratio"]
        # 0.8125 is written 0.812, as the log has it.
        assert f"{int(ratio['value'] * 1000) / 1000:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" in readme
    muon = pairs["muon", "dualized"]
    seconds, difference = muon["seconds_ratio"], muon["loss_difference"]
    assert f"{seconds['value']:.2f} [{seconds['low']:.2f}, {seconds['high']:.2f}]" in readme
    low, high = (f"{difference[key]:.3f}".replace("-", "−") for key in ("low", "high"))
    assert f"−{abs(difference['mean']):.3f} nats [{low}, {high}], p = {difference['p']:.2f}" in readme
    record = json.loads((readme_picture.RESULTS.parent / "record.json").read_text(encoding="utf-8"))
    trials = {entry["name"]: entry["trials"] for entry in record["entries"]}
    assert f"had {trials['dualized']} trials to Muon's {trials['muon']}**; AdamW had {trials['adamw']}." in readme


def test_the_picture_shows_the_sweeps_that_the_tutorial_prints():
    page = readme_picture.SWEEPS.read_text(encoding="utf-8")
    rates, losses = readme_picture.read_sweep(page, "width-dualized")
    assert rates == [2.83, 4, 5.66, 8, 11.3]
    assert set(losses) == {64, 128, 256, 512, 1024}
    assert losses[1024] == [1.8702, 1.8567, 1.8627, 1.8983, 1.9675]
    rates, losses = readme_picture.read_sweep(page, "width-adamw")
    lowest = {width: rates[values.index(min(values))] for width, values in losses.items()}
    assert lowest == {64: 0.008, 128: 0.002, 256: 0.001}


def test_the_log_opens_with_an_index_of_every_entry():
    text = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    index, *entries = re.split(r"^## ", text, flags=re.MULTILINE)
    headings = [entry.splitlines()[0] for entry in entries]
    assert re.findall(r"\]\(#([^)]+)\)", index) == [anchor(heading) for heading in headings]
