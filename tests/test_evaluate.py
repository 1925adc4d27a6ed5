"""training/evaluate.py: how far an evaluation is. Its numbers: test_train.py, test_ranks.py."""

import re

import torch
from training.evaluate import with_progress


def test_an_evaluation_tells_how_far_it_is():
    targets = torch.tensor([[0, 1, 2, -1]])
    said: list[str] = []
    batches = [(targets, targets)] * 4
    assert list(with_progress(batches, total=12, say=said.append, every=0.0)) == batches
    assert [re.sub(r", \d+ s", ", 7 s", line) for line in said] == [
        f"validation: {n} of 12 tokens, 7 s left" for n in (3, 6, 9)
    ]
    assert not list(with_progress([], total=12, say=said.append)) and len(said) == 3
