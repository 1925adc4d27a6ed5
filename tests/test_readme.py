"""README.md's Python runs as printed."""

import re

import torch

from tests.helpers import ROOT


def test_the_snippet_runs_and_its_optimizer_trains():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict = {}
    torch.manual_seed(0)
    exec(code[1], names)
    model, optimizer = names["model"], names["optimizer"]
    idx = torch.randint(65, (256,))
    losses = []
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 1 - step / 100
        loss = torch.nn.functional.cross_entropy(model(idx), (idx + 1) % 65)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_every_picture_and_page_that_it_shows_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("http")]
    assert len(shown) > 10
    assert [t for t in shown if not t.startswith("#") and not (ROOT / t.split("#")[0]).exists()] == []
