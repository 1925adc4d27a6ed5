"""Placements of models of every kind are right, by a judge that reads no names; and the judge sees what is wrong.

`make test` takes a tenth of the entries, another one every day; `make soak` takes all. NANODUAL_FLEET=3 chooses.
"""

import functools
import inspect
import os
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from optim import families, metrize
from optim.errors import CoverageError
from optim.norms import L1ToRMS, Norm, RMSToLinf, RMSToRMS
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tests.configurations import CLASSES, FLEET, B, D, T, V, labels, noise, tokens
from tests.fleet import ENTRIES, EXCEPTIONS, Placement, build, place, quiet, report, train
from tests.modules import MODULES, ORTHOGONAL, kinds_with_weights
from tests.perturbation import judge

SOAK = os.environ.get("NANODUAL_SOAK") == "1"
TENTH = int(os.environ["NANODUAL_FLEET"]) % 10  # which tests/conftest.py sets
REPEAT = f"NANODUAL_FLEET={TENTH} repeats this tenth of the fleet"
ROWS = 20  # of the table of families, at most

LAZY = [kind for kind in kinds_with_weights() if issubclass(kind, LazyModuleMixin)]

by_entry = pytest.mark.parametrize("name", [*ENTRIES] if SOAK else [*ENTRIES][TENTH::10])
pytestmark = pytest.mark.usefixtures("one_thread")
report_of = functools.cache(report)


# ---- placements


@pytest.mark.soak
@by_entry
def test_placements_are_right(name: str):
    entry = report_of(name)
    assert not entry.wrong, f"{name}; {REPEAT}"
    needless = [p for e, p in EXCEPTIONS if e == name and not any(fnmatchcase(weight, p) for weight in entry.excepted)]
    assert not needless, "exceptions that the judge does not need"


@pytest.mark.soak
@by_entry
def test_20_steps_on_one_batch_lower_the_loss(name: str):
    first, last = report_of(name).losses
    assert last < first, f"{name}; {REPEAT}"


@pytest.fixture(scope="module")
def placements() -> tuple[dict[str, Placement], set[tuple[str, str]]]:
    """How every entry is placed, and (class, weight) of the rows of the table of families that place one."""
    used: set[tuple[str, str]] = set()

    def noted(kind: str, weight: str, place_of: Callable) -> tuple[str, str, Callable]:
        def noting(module: nn.Module) -> object:
            known = place_of(module)
            if known is not None:
                used.add((kind, weight))
            return known

        return kind, weight, noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(noted(*row) for row in families.FAMILIES))
        return {name: place(build(name)[0]) for name in ENTRIES}, used


def test_nine_entries_of_ten_need_no_rule_and_the_others_one_that_the_error_prints(placements):
    by_name, _ = placements
    assert len(FLEET) >= 60
    messages = {name: p.message for name, p in by_name.items() if p.norm is None or p.pastes > 1 or len(p.rules) > 1}
    assert messages == {}, "they need more than one rule, or the rule that the error prints does not do"
    assert sum(not by_name[name].rules for name in FLEET) >= 0.9 * len(FLEET)


def test_the_table_of_families_is_short_and_each_row_places_an_entry(placements):
    _, used = placements
    rows = [row[:2] for row in families.FAMILIES]
    assert len(rows) <= ROWS
    assert [row for row in rows if row not in used] == []


def test_every_module_of_torch_that_has_weights_is_an_entry():
    with quiet():
        parts = [part for entry in MODULES.values() for part in entry()[0].modules()]
    kinds = [kind for kind in kinds_with_weights() if kind not in LAZY]
    assert len(kinds) > 35 and len(LAZY) > 12
    assert [kind.__name__ for kind in kinds if not any(isinstance(part, kind) for part in parts)] == []


@pytest.mark.parametrize("kind", LAZY)
def test_every_lazy_module_is_refused_by_the_names_of_its_weights(kind: type[nn.Module]):
    sizes = [3 for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    with quiet():
        model = nn.Sequential(kind(*sizes))
    with pytest.raises(CoverageError, match=r"^0\.weight\n  got: a parameter of a lazy module"):
        metrize(model)


@pytest.mark.parametrize("way", ORTHOGONAL)
def test_a_weight_that_torch_keeps_orthogonal_stays_so(way: str):
    model, batch = build(f"nn.orthogonal, {way}")
    norm = place(model).norm
    assert norm is not None
    train(model, batch, norm)
    assert isinstance(model.body, nn.Linear)
    W = model.body.weight
    assert torch.allclose(W @ W.T, torch.eye(len(W)), atol=1e-4)


# ---- the judge: wrong norms of models whose right ones are known

MATRIX = RMSToRMS()
WRONG = {
    "blocks of a matrix that stands head by head": ("codegen", "*qkv_proj.weight", Blocks(MATRIX, 3)),
    "GPT-NeoX's fused weight as three blocks": ("gpt_neox", "*query_key_value.weight", Blocks(MATRIX, 3)),
    "three maps as one": ("gpt2", "*c_attn.weight", Transposed(MATRIX)),
    "equal thirds of grouped queries": ("phi3", "*qkv_proj.weight", Blocks(MATRIX, 2)),
    "alternating gates as two blocks": ("gpt_oss", "*gate_up_proj", Experts(Transposed(Blocks(MATRIX, 2)))),
    "a matrix transposed": ("llama", "*up_proj.weight", Transposed(MATRIX)),
    "one map in two blocks": ("llama", "*up_proj.weight", Blocks(MATRIX, 2)),
    "experts with inputs as outputs": ("mixtral", "*down_proj", Experts(Transposed(MATRIX))),
    "gates and what they gate as one": ("mixtral", "*gate_up_proj", Experts(MATRIX)),
    "experts as one matrix": ("mixtral", "*down_proj", Flattened(MATRIX, 3)),
    "a head as a hidden map": ("llama", "lm_head.weight", MATRIX),
    "a hidden map as a head": ("llama", "*o_proj.weight", RMSToLinf()),
    "a table as a matrix": ("llama", "*embed_tokens.weight", MATRIX),
    "a hidden map as a table": ("llama", "*gate_proj.weight", L1ToRMS()),
    "positions as a matrix": ("gpt2", "*wpe.weight", MATRIX),
    "x, B and C of a state space as one": ("mamba", "*x_proj.weight", MATRIX),
    "an LSTM's four gates as two": ("nn.LSTM", "*weight_ih_l0", Blocks(MATRIX, 2)),
    "an LSTM's four gates as three": ("nn.LSTM", "*weight_hh_l0", Blocks(MATRIX, (12, 12, 16))),
    "a GRU's three gates as one": ("nn.GRU", "*weight_hh_l0", MATRIX),
    "groups of a convolution as one": ("nn.Conv2d groups", "body.weight", ConvRMSToRMS(dims=2)),
    "a transposed convolution as a plain one": ("nn.ConvTranspose1d", "body.weight", ConvRMSToRMS(dims=1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_judge_sees_a_wrong_norm_and_passes_the_right_one(case: str):
    name, pattern, wrong = WRONG[case]
    model, batch = build(name)
    placement = place(model)
    assert placement.norm is not None
    weight = next(n for n in placement.norm.norms if fnmatchcase(n, pattern))
    with quiet():
        assert not judge(model, batch, {weight: placement.norm.norms[weight]}, placement.norm.notes).wrong
        assert weight in judge(model, batch, {weight: wrong}).wrong


# ---- the judge: modules whose truth is known


class Handmade(nn.Module):
    """A function of the inputs and one weight, and a classifier of the mean of what it makes of all tokens."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape) / 5), function
        self.classifier = nn.Linear(function(noise(B, T, D), self.weight).shape[-1], CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.function(x, self.weight).reshape(len(x), -1, self.classifier.in_features)
        return nn.functional.cross_entropy(self.classifier(y.tanh().mean(1)), labels)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(sequences, tokens, heads, width of each) of queries, keys and values."""
    weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)


def alternating(x: Tensor, W: Tensor) -> Tensor:
    y = x @ W.T
    return y[..., ::2] * y[..., 1::2].sigmoid()


def gated(x: Tensor, W: Tensor) -> Tensor:
    gates, y = (x @ W.T).chunk(2, dim=-1)
    return y * gates.sigmoid()


def head_by_head(x: Tensor, W: Tensor) -> Tensor:
    return attend(*(x @ W.T).view(B, T, 4, 3, 5).unbind(3))


def one_behind_the_other(x: Tensor, W: Tensor) -> Tensor:
    return attend(*(x @ W.T).view(B, T, 3, 4, 5).unbind(2))


def grouped_queries(x: Tensor, W: Tensor) -> Tensor:
    q, k, v = (x @ W.T).split([20, 10, 10], dim=-1)
    return attend(q.view(B, T, 4, 5), *(part.view(B, T, 2, 5).repeat_interleave(2, 2) for part in (k, v)))


def recurrent(x: Tensor, W: Tensor) -> Tensor:
    """A state of 6 numbers: forget, input and candidate of it and x, one behind the other."""
    h = x.new_zeros(B, 6)
    for t in range(T):
        forget, add, candidate = (torch.cat([h, x[:, t]], -1) @ W.T).chunk(3, -1)
        h = forget.sigmoid() * h + add.sigmoid() * candidate.tanh()
    return h[:, None]


def mixture(x: Tensor, W: Tensor) -> Tensor:
    """One sequence for each expert, (experts, in, out)."""
    return torch.bmm(x, W)


def chosen(x: Tensor, W: Tensor) -> Tensor:
    return nn.functional.layer_norm(W[tokens()] + x[..., : W.shape[1]], W.shape[1:])


def added(x: Tensor, W: Tensor) -> Tensor:
    return nn.functional.layer_norm(x * 2 + W, W.shape[1:])


def biased(x: Tensor, W: Tensor) -> Tensor:
    """Attention with a bias for each offset and head, a table's row (heads)."""
    offsets = torch.arange(T)[:, None] - torch.arange(T) + T - 1
    weights = (x @ x.mT / 9 + W[offsets].permute(2, 0, 1)[:, None]).softmax(-1)
    return (weights @ x).movedim(0, 2).flatten(2)


Case = tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Norm, list[Norm]]
TRUTHS: dict[str, Case] = {
    "stored (out, in)": ((20, D), lambda x, W: x @ W.T, MATRIX, [Transposed(MATRIX), L1ToRMS(), Blocks(MATRIX, 2)]),
    "stored (in, out)": ((D, 20), lambda x, W: x @ W, Transposed(MATRIX), [MATRIX, Transposed(Blocks(MATRIX, 2))]),
    "alternating": ((40, D), alternating, Blocks(MATRIX, (1, 1), turns=20), [MATRIX, Blocks(MATRIX, 2)]),
    "gated": ((40, D), gated, Blocks(MATRIX, 2), [MATRIX, Blocks(MATRIX, (1, 1), turns=20), Blocks(MATRIX, 4)]),
    "head by head": ((60, D), head_by_head, Blocks(MATRIX, 3, turns=4), [MATRIX, Blocks(MATRIX, 3)]),
    "fused": (
        (60, D),
        one_behind_the_other,
        Blocks(MATRIX, 3),
        [MATRIX, Blocks(MATRIX, 3, turns=4), Blocks(MATRIX, 2)],
    ),
    "grouped queries": ((40, D), grouped_queries, Blocks(MATRIX, (20, 10, 10)), [Blocks(MATRIX, 4), Blocks(MATRIX, 2)]),
    "recurrent": ((18, 6 + D), recurrent, Blocks(MATRIX, 3), [MATRIX, Blocks(MATRIX, 2), Blocks(MATRIX, 3, turns=2)]),
    "experts": ((4, D, 20), mixture, Experts(Transposed(MATRIX)), [Experts(MATRIX), Flattened(MATRIX, 3)]),
    "rows chosen": ((V, 20), chosen, L1ToRMS(), [MATRIX, RMSToLinf(), Transposed(L1ToRMS())]),
    "positions added": ((T, D), added, L1ToRMS(), [MATRIX, RMSToLinf()]),
    "a bias of scores": ((2 * T - 1, 3), biased, L1ToRMS(), [MATRIX, RMSToLinf()]),
}


@pytest.mark.parametrize("case", TRUTHS)
def test_the_judge_knows_the_truth_of_a_module_of_two_lines(case: str):
    shape, function, right, wrong = TRUTHS[case]
    torch.manual_seed(0)
    model, batch = Handmade(shape, function), {"x": noise(B, T, D), "labels": labels()}
    assert not judge(model, batch, {"weight": right}).wrong
    passed = [str(norm) for norm in wrong if not judge(model, batch, {"weight": norm}).wrong]
    assert passed == []
