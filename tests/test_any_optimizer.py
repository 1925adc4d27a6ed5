"""training/baseline.py, training/optimizer_state.py: any torch optimizer of a model's weights can be raced, or is
refused with words before it trains.
"""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import pytorch_optimizer
import torch
from optim import Refusal
from optim.baselines import BASELINES, Several, register_baseline, set_beta
from optim.ranks import Ranks
from optim.settings import Help, Range
from torch import Tensor, nn
from training.baseline import Baseline, build_baseline
from training.config import Config, ConfigError, from_dict
from training.optimizer_state import OptimizerState, Packer, Unpacker

from tests.helpers import ranks
from tests.test_baselines import Net, assert_same, batches, descend, load, net, normed, pieces, save


def adapted(build: Callable[[Net], Any], seed: int = 0) -> tuple[Net, Baseline]:
    model = net(seed)
    return model, Baseline(build(model), model, max_grad_norm=None, scaling=None)


def refused(build: Callable[[Net], Any]) -> str:
    with pytest.raises(Refusal) as error:
        adapted(build)
    return str(error.value)


# ---- its parameters


def test_names_are_found_in_the_model_where_the_optimizer_has_none():
    model, optimizer = adapted(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert optimizer.receipt().splitlines()[1].startswith("embedding.weight  (13, 8)  lr 0.1")
    _, wrong = adapted(lambda m: torch.optim.SGD([(f"module.{n}!", p) for n, p in m.named_parameters()], lr=0.1))
    assert wrong.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_weights_that_are_missing_or_twice_and_tensors_that_are_none_are_named():
    sgd = torch.optim.SGD
    assert refused(lambda m: sgd([m.up.weight, m.norm.weight], lr=1.0)) == (
        "SGD: its parameters\n  got: no embedding.weight, up.bias, down.weight, head.weight\n"
        "  allowed: every trainable weight of the model, once\n  fix: SGD(model.named_parameters(), …)"
    )
    assert "got: twice up.bias\n" in refused(lambda m: sgd([*m.parameters(), m.up.bias], lr=1.0))
    several = refused(lambda m: Several(sgd(m.parameters(), lr=1.0), sgd([m.head.weight], lr=1.0)))
    assert several.startswith("Several: its parameters\n  got: twice head.weight\n")
    foreign = refused(lambda m: sgd([*m.parameters(), nn.Parameter(torch.zeros(3))], lr=1.0))
    assert "got: a tensor of shape (3,) that is no weight\n" in foreign


def test_frozen_weights_may_be_left_out_or_not():
    for trained in (True, False):
        model = net()
        model.norm.weight.requires_grad_(False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad or trained], lr=0.1)
        descend(model, Baseline(sgd, model, max_grad_norm=1.0, scaling=None), batches(2))


# ---- its learning rate


class NoDefaults(torch.optim.SGD):
    """As some libraries' Muon: a group has its lr, the defaults have none."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=1.0)
        del self.defaults["lr"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, NoDefaults])
def test_groups_keep_their_multiples_of_one_lr(kind: Callable[..., Any]):
    def build(model: Net) -> Any:
        vectors = [p for p in model.parameters() if p.ndim < 2]
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        return kind([{"params": matrices, "lr": 0.4}, {"params": vectors, "lr": 0.1, "lr_scale": 2.0}])

    model, optimizer = adapted(build)
    assert optimizer.defaults["lr"] == 0.4
    assert [(g["lr"], g.get("lr_scale", 1.0)) for g in optimizer.param_groups] == [(0.4, 1.0), (0.4, 0.5)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    descend(model, optimizer, batches(1))
    other = net()
    loss = nn.functional.cross_entropy(other(batches(1)[0][:, 0]), batches(1)[0][:, 1])
    loss.backward()
    for name, p in other.named_parameters():
        assert p.grad is not None
        step = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(step, (0.1 if p.ndim < 2 else 0.2) * p.grad)


def test_groups_without_an_lr_of_their_own_stand_still_where_the_default_is_zero():
    def build(model: Net) -> Any:
        return torch.optim.SGD([{"params": [*model.up.parameters()], "lr": 0.1}, {"params": others(model)}], lr=0.0)

    _, optimizer = adapted(build)
    assert optimizer.defaults["lr"] == 0.1
    assert [(g["lr"], g.get("lr_scale", 1.0)) for g in optimizer.param_groups] == [(0.1, 1.0), (0.1, 0.0)]


def test_an_lr_that_is_a_tensor_is_a_number_and_none_is_refused():
    _, optimizer = adapted(lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.5)))
    assert optimizer.defaults["lr"] == 0.5 and type(optimizer.param_groups[0]["lr"]) is float
    assert refused(lambda m: pytorch_optimizer.A2Grad(m.named_parameters())).startswith(
        "A2Grad: the lr of a group\n  got: None\n  allowed: a finite number: the training loop sets"
    )


# ---- its step


def test_a_step_that_needs_a_closure_is_refused():
    message = "LBFGS.step\n  got: a step that needs closure\n  allowed: a step from gradients alone"
    assert refused(lambda m: torch.optim.LBFGS(m.parameters())).startswith(message)
    model, optimizer = adapted(lambda m: pytorch_optimizer.BSAM(m.parameters(), num_data=10))
    with pytest.raises(Refusal, match=r"BSAM\.step\n  got: bSAM requires closure"):
        descend(model, optimizer, batches(1))


class Noisy(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=-group["lr"])


def _noise(rank: int, world: int) -> list[Tensor]:
    model, optimizer = adapted(lambda m: Noisy(m.parameters(), lr=0.1))
    torch.manual_seed(rank)  # as the loop seeds each rank's part of a batch
    descend(model, optimizer, batches(2))
    return [p.detach() for p in model.parameters()]


def test_an_optimizer_that_draws_random_numbers_draws_the_same_on_all_ranks():
    one, two = ranks(2, _noise)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def _collectives(rank: int, world: int) -> list[str]:
    model, optimizer = adapted(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    descend(model, optimizer, batches(1))
    names: list[str] = []
    for name in ("broadcast", "maximum"):
        method = getattr(Ranks, name)
        setattr(Ranks, name, lambda *a, n=name, m=method, **k: (names.append(n), m(*a, **k))[1])
    descend(model, optimizer, batches(1))
    return names


def test_ranks_agree_on_a_seed_by_the_collective_that_says_who_has_gradients():
    assert ranks(2, _collectives) == [["maximum"]] * 2


# ---- its average of gradients


@pytest.mark.parametrize(
    ("group", "after"),
    [
        ({"momentum": 0.9, "dampening": 0.9}, {"momentum": 0.7, "dampening": 0.7}),
        ({"momentum": 0.9, "dampening": 0.0}, {"momentum": 0.7, "dampening": 0.0}),
        ({"betas": (0.9, 0.95, 0.99)}, {"betas": (0.7, 0.95, 0.99)}),
        ({"beta": 0.9, "betas": (0.9, 0.99)}, {"beta": 0.7, "betas": (0.9, 0.99)}),
        ({"betas": None}, {"betas": None}),
        ({"betas": (None, 0.99)}, {"betas": (None, 0.99)}),  # Adafactor without an average
        ({"alpha": 0.99}, {"alpha": 0.99}),
        ({"betas": (0.9, 0.99), "auxiliary": True}, {"betas": (0.9, 0.99), "auxiliary": True}),
    ],
)
def test_set_beta_leaves_alone_what_it_does_not_know(group: dict[str, Any], after: dict[str, Any]):
    set_beta(group, 0.7)
    assert group == after


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.baselines.BASELINES", dict(BASELINES))


def add(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[..., Any]) -> None:
    monkeypatch.setitem(BASELINES, name, replace(BASELINES["sgd"], name=name, build=build))


def config(name: str, **schedule: float) -> Config:
    return from_dict(Config, {"run": {"name": "x"}, "optim": {"name": name, "lr": 0.1}, "schedule": schedule})


def test_the_loop_sets_no_momentum_that_the_optimizer_was_not_built_with(monkeypatch: pytest.MonkeyPatch):
    """SGD has the key momentum without using it, and a fixed beta of its own is not the configuration's."""

    def plain(model, norm, *, lr: float, beta: float) -> Any:
        return torch.optim.SGD(model.named_parameters(), lr=lr)

    def fixed(model, norm, *, lr: float) -> Any:
        return torch.optim.Adam(model.named_parameters(), lr=lr, betas=(0.95, 0.99))

    for name, build in (("plain", plain), ("fixed", fixed)):
        add(monkeypatch, name, build)
        model = net()
        optimizer = build_baseline(config(name), model, normed(model))
        for group in optimizer.param_groups:
            set_beta(group, 0.5)
            assert group.get("momentum", 0) == 0 and group.get("betas", (0.95,))[0] == 0.95
        refuses_beta(config(name, beta_cooldown=0.1), model)
    model = net()
    build_baseline(config("adamw", beta_cooldown=0.1), model, normed(model))


def refuses_beta(config: Config, model: Net) -> None:
    with pytest.raises(ConfigError, match="schedule.beta_warmup and schedule.beta_cooldown\n  got: a schedule of"):
        build_baseline(config, model, normed(model))


def test_a_schedule_of_beta_is_refused_where_there_is_no_average_of_gradients(monkeypatch: pytest.MonkeyPatch):
    def adagrad(model, norm, *, lr: float) -> Any:
        return torch.optim.Adagrad(model.named_parameters(), lr=lr)

    add(monkeypatch, "adagrad", adagrad)
    for name in ("adagrad", "adafactor"):
        refuses_beta(config(name, beta_warmup=0.1), net())


# ---- its state


class Hoarder(torch.optim.Optimizer):
    """Every kind of state: by parameter, in groups, in attributes, and shared by all."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "best": None, "hook": print, "scale": 0.5})
        for group in self.param_groups:
            group["history"] = []
        self.count, self.generator = 0, torch.Generator().manual_seed(3)
        self.total = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.count += 1
        shared = self.state["shared"]  # type: ignore[index]
        shared["mean"] = shared.get("mean", 0.0) * 0.5 + self.count
        noise = torch.rand((), generator=self.generator).item()
        for group in self.param_groups:
            group["k"] += 1
            group["history"].append(noise)
            group["best"] = max(group["history"])
            if "weight_sum" not in group:  # one tensor of all groups
                first = self.param_groups[0]
                group["weight_sum"] = first.get("weight_sum", torch.zeros(1, dtype=torch.float64))
            group["weight_sum"] += group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    self._step(group, p, p.grad, noise + shared["mean"] / 100)

    def _step(self, group: dict[str, Any], p: Tensor, grad: Tensor, noise: float) -> None:
        s = self.state[p]
        if not s:
            s.update(step=0, Q=None, kind="first", rows=deque(maxlen=2), by_dim={0: [], 1: [torch.zeros(0)]})
        rows = grad.reshape(len(grad), -1)
        s["step"], s["kind"] = s["step"] + 1, "later"
        # A transposed product, an int8 tensor, a flag, a nested pair: none of them of the weight's shape.
        s["Q"] = (torch.linalg.qr(rows @ rows.mT + torch.eye(len(rows)))[0], {"sign": rows.sign().to(torch.int8)})
        s["rows"].append(rows.mean(0))
        s["seen"] = torch.tensor(True)
        s["transposed"] = rows.mT.clone().mT if rows.shape[1] > 1 else None
        self.total += grad.abs().sum()
        size = sum(x.norm() for x in s["rows"]) * float(self.total) * (1 + group["best"]) / group["weight_sum"]
        update = s["Q"][0] @ s["Q"][1]["sign"].double() + noise * (s["transposed"] if rows.shape[1] > 1 else rows)
        p.add_(update.view_as(p) / (1 + size), alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Net], Any]] = {
    "every kind": lambda m: Hoarder(m.parameters()),
    "two groups of it": lambda m: Hoarder([{"params": [*m.up.parameters()]}, {"params": [*others(m)], "lr": 0.05}]),
    "several": lambda m: Several(Hoarder(m.up.parameters()), torch.optim.Adam(others(m), lr=0.1)),
    "Lookahead": lambda m: pytorch_optimizer.Lookahead(torch.optim.AdamW(m.parameters(), lr=0.01), k=2),
    "a schedule-free wrapper": lambda m: pytorch_optimizer.ScheduleFreeWrapper(
        torch.optim.SGD(m.named_parameters(), lr=0.1, momentum=0.9)
    ),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1),
    "torch's Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1),
    "AMSGrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "Shampoo": lambda m: pytorch_optimizer.Shampoo(m.parameters(), lr=0.01),
    "DAdaptAdam": lambda m: pytorch_optimizer.DAdaptAdam(m.parameters()),
    "schedule-free SGD": lambda m: pytorch_optimizer.ScheduleFreeSGD(m.parameters()),
    "AdEMAMix": lambda m: pytorch_optimizer.AdEMAMix(m.parameters(), lr=0.01),
    # It balances at random by numpy's own generator, which the loop does not seed.
    "Kron": lambda m: pytorch_optimizer.Kron(m.parameters(), lr=0.01, balance_prob=0.0),
    "counters of every kind": lambda m: Decaying(m.parameters()),
}


class Decaying(torch.optim.SGD):
    """One whose decay grows with counters that change in place, and that holds what never changes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.counts, self.order, self.totals = defaultdict(int), OrderedDict(a=1, b=2), Counter[str]()
        self.numbers: set[int] = set()
        self.hooks, self.device, self.weights = [print, torch.relu], torch.device("cpu"), self.param_groups[0]["params"]
        self.shapes = {p: p.shape for p in self.weights}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.device = torch.device("cpu")
        self.counts["steps"] += 1
        self.order.move_to_end(next(iter(self.order)))
        self.totals["a"] += self.order["a"]
        self.numbers.add(len(self.numbers))
        self.param_groups[0]["weight_decay"] = 0.01 * (self.counts["steps"] + self.totals["a"] + len(self.numbers))
        self.state["steps"] = self.counts["steps"]  # type: ignore[index,assignment]
        for p in self.weights:
            self.state[p] = self.state.get(p, 0) + p.detach().sum()  # no dict, and zero is kept
        super().step()


def others(model: nn.Module) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if not n.startswith("up.")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_any_kind_is_resumed_to_the_same_bits(name: str, tmp_path: Path):
    data = batches(7)
    model, optimizer = adapted(OPTIMIZERS[name])
    torch.manual_seed(0)
    descend(model, optimizer, data[:3])
    checkpoint = save(tmp_path, model, optimizer)
    other, resumed = adapted(OPTIMIZERS[name], seed=1)
    load(checkpoint, other, resumed)
    for m, o in ((model, optimizer), (other, resumed)):
        torch.manual_seed(1)  # as the loop seeds every step
        descend(m, o, data[3:])
    assert_same(other.state_dict(), model.state_dict())
    assert_same(pieces(resumed), pieces(optimizer))
    assert resumed.packed() == optimizer.packed()


def test_a_setting_that_was_changed_is_no_state_of_a_resumed_optimizer(tmp_path: Path):
    model, optimizer = adapted(lambda m: Hoarder(m.parameters()))
    descend(model, optimizer, batches(2))
    other, resumed = adapted(lambda m: Hoarder(m.parameters(), lr=0.2))
    resumed.param_groups[0]["scale"] = 0.25
    load(save(tmp_path, model, optimizer), other, resumed)
    group = resumed.param_groups[0]
    assert (group["lr"], group["scale"], group["k"]) == (0.2, 0.25, 2)


def test_values_are_packed_and_unpacked_as_they_were():
    x = torch.arange(6.0).view(2, 3)
    value = {
        "a": [1, 2.5, math.inf, None, True, "text"],
        3: (x, x.mT.clone(), torch.zeros(2, 0), x),
        "d": deque([1, 2], maxlen=3),
        "deep": {"scalar": torch.tensor(4, dtype=torch.int64)},
        "kinds": [defaultdict(list, a=[1]), defaultdict(None), OrderedDict(b=1, a=2), Counter(a=3), {1, "a"}],
        "frozen": frozenset({(1, 2)}),
    }
    packer = Packer(x.device)
    again = Unpacker(x.device).unpack(json.loads(json.dumps(packer.pack(value, "v"))))
    assert list(again) == list(value) and again["a"] == value["a"]
    assert again["d"] == value["d"] and again["d"].maxlen == 3
    for one, two in zip([*again["kinds"], again["frozen"]], [*value["kinds"], value["frozen"]], strict=True):
        assert type(one) is type(two) and one == two
        assert getattr(one, "default_factory", None) is getattr(two, "default_factory", None)
    assert [t.shape for t in again[3]] == [(2, 3), (3, 2), (2, 0), (2, 3)] and again[3][1].stride() == (1, 3)
    assert again[3][0] is again[3][3], "a tensor that stands twice is one"
    assert again["deep"]["scalar"].shape == () and again["deep"]["scalar"].dtype is torch.int64
    assert {k: t.shape for k, t in packer.tensors.items()} == {"v.3.0": (2, 3), "v.3.1": (3, 2), "v.deep.scalar": ()}


def test_a_list_that_groups_share_and_steps_change_is_refused():
    def build(model: Net) -> Any:
        optimizer = OPTIMIZERS["two groups of it"](model)
        one, two = optimizer.param_groups
        two["history"] = one["history"]
        return optimizer

    model, optimizer = adapted(build)
    with pytest.raises(Refusal, match="the optimizer's state history\n  got: one object that several groups share"):
        descend(model, optimizer, batches(1))


class Projector:
    pass


class Odd(torch.optim.SGD):
    """One whose state no file holds: an object of its own, or tensors in an attribute, say."""

    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, lr=0.1)
        self.where, self.cache, self.flat = where, {}, torch.zeros(6)
        if where in ODD:
            self.odd = ODD[where]()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        p = self.param_groups[0]["params"][0]
        if self.where == "state":
            self.state[p]["projector"] = Projector()
        elif self.where == "views":
            self.state[p].update(first=self.flat[:3], second=self.flat[3:])
        elif self.where == "weights":
            self.state[p]["before"] = p.detach().view(-1)
        elif self.where == "no weight":
            self.state[torch.zeros(2, 3)]["x"] = 1
        elif self.where == "cache":
            self.cache[id(p)] = torch.zeros(3)


# What changes in place, so that it may be state although it is one and the same object.
ODD: dict[str, Callable[[], Any]] = {
    "array": lambda: np.zeros(3),
    "generator": lambda: np.random.default_rng(0),
    "lambda": lambda: defaultdict(lambda: 0.0),
    "object": Projector,
    "in a list": lambda: [print, Projector()],
}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "state",
            "the optimizer's state embedding.weight.projector\n  got: a tests.test_any_optimizer.Projector, which no",
        ),
        ("cache", "the optimizer's attribute cache\n  got: tensors that are in none of its groups"),
        ("array", "the optimizer's state (Odd).odd\n  got: a numpy.ndarray, which no checkpoint holds"),
        ("generator", "the optimizer's state (Odd).odd\n  got: a numpy.random._generator.Generator, which no"),
        ("lambda", "the optimizer's state (Odd).odd\n  got: a defaultdict of <function <lambda>"),
        ("object", "the optimizer's state (Odd).odd\n  got: a tests.test_any_optimizer.Projector, which no"),
        ("in a list", "the optimizer's state (Odd).odd.1\n  got: a tests.test_any_optimizer.Projector, which no"),
        (
            "views",
            "the optimizer's state (Odd).flat\n  got: a tensor that shares its memory with embedding.weight.first\n",
        ),
        (
            "weights",
            "the optimizer's state embedding.weight.before\n  got: a tensor that shares its memory with embedding.w",
        ),
        ("no weight", "the state of Odd\n  got: self.state of a tensor of shape (2, 3) that is no weight\n"),
    ],
)
def test_state_that_no_checkpoint_holds_is_refused_after_the_first_step_unless_none_are_saved(where: str, message: str):
    model = net()
    optimizer = Baseline(Odd(model.parameters(), where), model, max_grad_norm=None, scaling=None)
    with pytest.raises(Refusal) as error:
        descend(model, optimizer, batches(1))
    assert str(error.value).startswith(message) and "--train.keep-checkpoints 0" in str(error.value)
    unsaved = Baseline(Odd(model.parameters(), where), model, max_grad_norm=None, scaling=None, saved=False)
    descend(model, unsaved, batches(2))
    unsaved.held()  # a run's summary has their size


def test_a_counter_of_an_older_checkpoint_is_read_where_torch_has_it():
    """A step on the device costs Adam's plain loop a wait for each weight; a fused one needs it there."""
    cases: list[tuple[dict[str, Any], bool | None]] = [
        ({}, True),
        ({"fused": True}, None),
        ({"capturable": True}, None),
    ]
    for options, host in cases:
        model = net()
        adam = torch.optim.Adam([model.up.bias], **options)
        state = OptimizerState(adam, {model.up.bias: "up.bias"})
        packed = state.packed_before({"up.bias.step": ((1,), torch.float32), "up.bias.exp_avg": ((24,), torch.float64)})
        rows = dict(packed["by_parameter"][0]["up.bias"]["dict"])
        assert rows["step"].get("host") is host and "host" not in rows["exp_avg"]


# ---- its declaration


def declare(build: Callable[..., Any], name: str = "mine") -> str:
    with pytest.raises(Refusal) as error:
        register_baseline(name)(build)
    return str(error.value)


def test_a_declaration_that_cannot_be_is_refused_with_words(registry: None):
    def loose(model, norm, lr: float) -> Any: ...
    def anything(model, norm, **settings) -> Any: ...
    def unhelpful(model, norm, *, lr: float, rho: float = 0.1) -> Any: ...
    def outside(model, norm, *, rho: Annotated[float, Range(0, 1), Help("How far.")] = 2.0) -> Any: ...
    def pair(model, norm, *, rho: Annotated[tuple[float, float], Help("How far.")] = (1.0, 2.0)) -> Any: ...
    def unread(model, norm, *, lr: "Unknown") -> Any: ...  # type: ignore[name-defined]  # noqa: F821

    assert declare(loose).startswith("register_baseline: mine\n  got: a function of (model, norm, lr: float)\n")
    assert "allowed: (model, norm), then settings that are keywords only" in declare(anything)
    assert declare(torch.optim.SGD).startswith("register_baseline: mine\n  got: a function of (params")
    assert declare(unhelpful).startswith("register_baseline: rho of mine\n  got: a setting without default or help")
    assert "got: the default 2.0\n  allowed: a number x with 0 <= x < 1\n" in declare(outside)
    assert "fix: another default, or a type that TOML has: float, int, bool, str, Literal, list" in declare(pair)
    assert "got: an annotation that cannot be read: name 'Unknown' is not defined" in declare(unread)


def test_a_name_that_is_taken_is_refused_and_the_same_definition_again_is_not(registry: None):
    def mine(model, norm, *, lr: float) -> Any: ...
    def sgd(model, norm, *, lr: float) -> Any: ...

    register_baseline("mine")(mine)
    register_baseline("mine")(mine)
    assert declare(sgd).startswith("register_baseline: mine\n  got: a name that tests.test_any_optimizer has")
    assert declare(mine, "soap").startswith("register_baseline: soap\n  got: a name that training.published has")


def test_what_is_no_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch):
    def nothing(model, norm, *, lr: float) -> Any: ...

    add(monkeypatch, "nothing", nothing)
    with pytest.raises(Refusal, match="nothing: what its function returns\n  got: a NoneType\n  allowed: a torch opt"):
        BASELINES["nothing"](net(), None, lr=0.1)  # type: ignore[arg-type]


def test_an_error_of_a_baselines_function_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch):
    def careless(model, norm, *, lr: float) -> Any:
        return torch.optim.SGD(model.named_parameters(), lr=-lr)

    def refusing(model, norm, *, lr: float) -> Any:
        raise Refusal("mine", got="1", allowed="2", fix="3")

    add(monkeypatch, "careless", careless)
    add(monkeypatch, "refusing", refusing)
    with pytest.raises(Refusal) as error:
        BASELINES["careless"](net(), None, lr=0.1)  # type: ignore[arg-type]
    line = careless.__code__.co_firstlineno + 1
    assert str(error.value) == (
        "careless: its function raised\n  got: ValueError: Invalid learning rate: -0.1\n"
        f"  allowed: a function that returns what it builds\n  fix: see {__file__}, line {line}"
    )
    with pytest.raises(Refusal, match="^mine\n  got: 1"):
        BASELINES["refusing"](net(), None, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BASELINES)
def test_sharpness_needs_coordinates_that_the_baseline_declares(name: str):
    raw: dict[str, Any] = {"run": {"name": "x"}, "optim": {"name": name}, "train": {"sharpness_every": 5}}
    known: dict[str, Literal["standard", "modular"]] = {
        "normalized_adam": "modular",
        "normalized_sgd": "modular",
        "adamw": "standard",
        "sgd": "standard",
    }
    assert BASELINES[name].scaling == known.get(name)
    checked = from_dict(Config, raw)
    if name in known:
        checked.check()
    else:
        with pytest.raises(ConfigError, match=f'never \\(0\\) with optim.name = "{name}", which has no coordinates'):
            checked.check()
