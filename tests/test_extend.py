"""docs/extend.md: each block of Python is a plugin that trains with the TOML below it; the race runs as printed."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, SMALL, TEXT, run

# A reader's own my_optimizer.py may stand in the checkout: the page's modules get other names.
PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8").replace("my_", "page_")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", PAGE, re.MULTILINE))
PARTS = ("A norm", "A direction", "An optimizer to compare with", "A tokenizer", "A model")


def blocks(section: str, language: str) -> list[str]:
    """The blocks of code of a section in a language; "" is what is typed and printed in a shell."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)
    return [code for kind, code in fenced if kind == language]


def commands(section: str) -> Iterator[list[str]]:
    """The words of each command of a section."""
    for block in blocks(section, ""):
        lines = re.findall(r"^(?:\$ )?(python -m .*)", block.replace("\\\n", " "), re.MULTILINE)
        yield from (shlex.split(line)[2:] for line in lines)


def plugin(section: str) -> str:
    """The name of a section's module, which stands before its code."""
    return re.findall(r"`(page_\w+)\.py`:\n```python", SECTIONS[section])[0]


def dumped(sections: Mapping[str, Any], prefix: str = "") -> str:
    """A configuration as TOML."""
    tables = {k: v for k, v in sections.items() if isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}\n" for k, v in sections.items() if k not in tables]
    below = [f"[{prefix}{name}]\n{dumped(table, f'{prefix}{name}.')}" for name, table in tables.items()]
    return "".join([*lines, *below])


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both configurations; where both have a key, the second's."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict):
            both[key] = merged(first[key], second[key])
    return both


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's plugins, a text, and the dataset of bytes that stands for the embedded corpus."""
    root = tmp_path_factory.mktemp("extended")
    for section in PARTS:
        (root / f"{plugin(section)}.py").write_text(blocks(section, "python")[0])
    (root / "my.txt").write_text(TEXT)
    arguments = ("text", "my.txt", "--tokenizer", "bytes", "--out", "corpora/pysource")
    code, _, err = run(root, *arguments, script="data.prepare")
    assert code == 0, err
    return root


def test_the_page_has_every_kind_of_part_and_the_race():
    assert [name for name in SECTIONS if name in PARTS] == list(PARTS) and "Race your optimizer" in SECTIONS
    for section in PARTS:
        (code,) = blocks(section, "python")
        body = [line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
        assert len(body) <= 18, section


@pytest.mark.parametrize("section", PARTS)
def test_each_part_trains_with_the_lines_that_name_it(root: Path, section: str):
    for module, *arguments in commands(section):
        code, _, err = run(root, *arguments, script=module)
        assert code == 0, err
    (lines,) = blocks(section, "toml")
    base = merged(tomllib.loads(SMALL), {"data": {"dataset": "corpora/pysource"}, "train": {"steps": 4}})
    (root / "c.toml").write_text(dumped(merged(base, tomllib.loads(lines))))
    name = plugin(section)
    code, _, err = run(root, "c.toml", "--run.name", name)
    assert code == 0, err
    assert list(json.loads((root / f"runs/{name}/summary.json").read_text())["plugins"]) == [name]
    resolved = merged(tomllib.loads((root / f"runs/{name}/config.toml").read_text()), tomllib.loads(lines))
    assert resolved == tomllib.loads((root / f"runs/{name}/config.toml").read_text()), "what the page sets"
    code, out, err = run(root, f"runs/{name}", "--tokens", "3", script="sample.py")
    assert code == 0 and out, err


def test_the_norm_of_the_page_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("optim.norms.NORMS", {})
    names: dict[str, Any] = {}
    (code,) = blocks("A norm", "python")
    exec(code, names)
    G = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for p in (4.0, 2.0, 1.5):
        norm = names["Power"](p)
        torch.testing.assert_close(norm.norm(norm.dualize(G)), torch.ones(3, 2, dtype=torch.float64))
        torch.testing.assert_close((G * norm.dualize(G)).sum((-2, -1)), norm.dual_norm(G))
    assert not names["Power"]().dualize(torch.zeros(2, 2)).any()


def test_the_race_runs_as_printed(root: Path):
    """The race's commands, with a smaller model on another text, and 4 steps instead of 40."""
    race = tomllib.loads((ROOT / "configs/race/adamw.toml").read_text(encoding="utf-8"))
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16}
    race = merged(race, {"model": small, "train": {"batch_size": 4, "eval_tokens": 256}})
    (root / "configs/race").mkdir(parents=True)
    (root / "configs/race/adamw.toml").write_text(dumped(race))
    (own,) = blocks("Race your optimizer", "toml")
    (root / "mine.toml").write_text(dumped(race | tomllib.loads(own)))
    (_, *first), *others = commands("Race your optimizer")
    assert first == ["pysource"]
    for module, *arguments in others:
        arguments = [a.replace("steps=40", "steps=4").replace(".s40.", ".s4.") for a in arguments]
        code, out, err = run(root, *arguments, script=module)
        assert code == 0, err
        assert "runs/race-mine/report.html" in out or "script.py" in out
    results = json.loads((root / "runs/race-mine/results.json").read_text())
    assert [e["name"] for e in results["entries"]] == ["mine", "adamw"]
