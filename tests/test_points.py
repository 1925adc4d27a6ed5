"""Old optimizers as points of the design space: the [optim] section of configs/points/*.toml against torch's own
optimizers, published code (pytorch_optimizer; numbers recorded from prodigyopt) or an identity of autograd and eigh,
over 50 steps in float64.
"""

import copy
import json
import math
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from optim import Dualized, metrize
from optim.modular import Module, atom
from optim.norms import Norm
from pytorch_optimizer.optimizer import scion as published_scion
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor, nn
from training.config import OptimConfig, load

from tests.helpers import ROOT, run, small_dataset

POINTS = {p.stem: p for p in sorted((ROOT / "configs/points").glob("*.toml"))}
STEPS = 50

# Distances between two trajectories, each on gradients of its own, over the distance travelled.
ROUNDING = (
    1e-12  # equal in exact arithmetic: 2e-16 a step, times Jordan's slope at 0, 3.4445⁵ = 485, at most (found: 1e-14)
)
# the other side adds 1e-8 … 1e-6 to a gradient's size, and gradients are scaled up by 1e6, which ours does not see
# (found: 2e-12)
EPSILON = 1e-10
# G Gᵀ squares the condition number: singular values of 1e-4 of the largest are known to 2e-16 / 1e-8 (found: 3e-8)
SQUARED = 1e-6
# SOAP's basis turns by rounding over its shift, √ε = 1.5e-8, in both: 1 − cos is the square, times what 50 steps add
# (found: FOUND).
TURNED = 1e-10
RECORDED = 1e-9  # ROUNDING, and sums in another machine's order (found: equal)
SINGLE = 1e-6  # pytorch_optimizer's Prodigy adds up its distance in float32 (found: 1e-7)
# One step of Muon in bfloat16: five iterations on numbers of 8 bits, 0.4 % each, with slopes above 1 (found: 0.026,
# largest singular value 1.134 in both).
BFLOAT16, BFLOAT16_BAND = 0.05, 0.01

Step = Callable[[], object]


class Net(nn.Module):
    """One weight of each role of a GPT, float64: 7 tokens, 6 wide, 15 hidden.

    Its numbers are Python's, the same in every version of torch.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.attention, self.mlp, self.head = (nn.Linear(i, o, bias=False) for i, o in ((6, 15), (15, 6), (6, 7)))
        self.double()
        rng = random.Random(0)
        for p in self.parameters():
            p.data = torch.tensor([rng.uniform(-0.7, 0.7) for _ in range(p.numel())], dtype=p.dtype).view_as(p)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        return self.head(x + self.mlp(torch.tanh(self.attention(x))))

    def structure(self, norms: dict[str, Norm]) -> Module:
        embedding, attention, mlp, head = (
            atom(f"{role}.weight", norms[role], role=role) for role in ("embedding", "attention", "mlp", "head")
        )
        return head @ mlp @ attention @ embedding


def backward(model: nn.Module, step: int, *, scale: float = 1.0, every_token: bool = False) -> None:
    """The gradient of a noisy minibatch of 12 tokens, times scale; about one of the 7 is missing unless every_token."""
    rng = random.Random(step)
    x = [*range(7 if every_token else 0)]
    x += [int(7 * rng.random()) for _ in range(12 - len(x))]
    y = torch.tensor([int(7 * rng.random()) for _ in x])
    model.zero_grad()
    (scale * nn.functional.cross_entropy(model(torch.tensor(x)), y)).backward()


def point(name: str, *options: str) -> OptimConfig:
    return load([str(POINTS[name]), *options]).optim


def build(o: OptimConfig, model: Net) -> Dualized:
    """The optimizer of a configuration, as train_gpt.py makes it."""
    norm = metrize(model, model.structure(o.norms.build(o.polar, n_head=1)))
    lr = o.auto if isinstance(o.lr, str) else o.lr
    return Dualized(model, lr, norm=norm.unweighted() if o.composition == "max" else norm, **o.step_settings())


def apart(model: Net, twin: Net) -> float:
    """The largest distance between two weights over the distance one has travelled; every one must have moved."""
    way = [
        (p - q).norm() / (p - start).norm()
        for p, q, start in zip(model.parameters(), twin.parameters(), Net().parameters(), strict=True)
    ]
    assert all(w.isfinite() for w in way)
    return max(w.item() for w in way)


def follow(
    o: OptimConfig,
    oracle: Callable[[Net], Step],
    *,
    mine: Callable[[OptimConfig, Net], Dualized] = build,
    **batch: float,
) -> float:
    """How far apart our optimizer and an oracle of a twin network are after 50 steps."""
    model, twin = Net(), Net()
    pairs = [(model, mine(o, model).step), (twin, oracle(twin))]
    for t in range(STEPS):
        for net, step in pairs:
            backward(net, t, **batch)  # type: ignore[arg-type]
            step()
    return apart(model, twin)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def descend(params: Sequence[Tensor], lr: float, direction: Callable[[Tensor], Tensor]) -> Step:
    """W ← W − lr · direction(gradient)."""

    @torch.no_grad()
    def step() -> None:
        for p in params:
            with torch.enable_grad():
                update = direction(p.grad)  # type: ignore[arg-type]
            p.sub_(update, alpha=lr)

    return step


def resized(
    params: Sequence[Tensor], base: Callable[[list[Tensor]], torch.optim.Optimizer], size: Callable[[Tensor], Tensor]
) -> Step:
    """W ← W + size(u), u being the base optimizer's own update: it steps from zero weights, so that u has no rounding
    of theirs.
    """
    shadows = [torch.zeros_like(p) for p in params]
    optimizer = base(shadows)

    @torch.no_grad()
    def step() -> None:
        for p, u in zip(params, shadows, strict=True):
            u.zero_().grad = p.grad
        optimizer.step()
        for p, u in zip(params, shadows, strict=True):
            p.add_(size(u))

    return step


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of Muon and of Scion casts to bfloat16 before it iterates: to float64 instead."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda X: X.double().clone())
    iterate = partial(zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(published_scion, "zero_power_via_newton_schulz_5", iterate)


# ---- one weight at a time, no averages


def dual_rms_to_rms(G: Tensor) -> Tensor:
    return max(1, G.shape[0] / G.shape[1]) ** 0.5 * torch.linalg.matrix_norm(G, "nuc")


@pytest.mark.parametrize(
    ("name", "options", "dual_norm"),
    [
        ("sign_descent", (), lambda G: G.abs().sum()),
        ("normalized_sgd", (), torch.linalg.matrix_norm),
        ("shampoo", (), partial(torch.linalg.matrix_norm, ord="nuc")),
        ("spectral_descent", ("--optim.polar.schedule", "exact"), dual_rms_to_rms),
    ],
)
def test_without_averages_a_step_is_autograds_gradient_of_the_dual_norm(
    name: str, options: tuple[str, ...], dual_norm: Callable[[Tensor], Tensor]
):
    """∇‖G‖† = dualize(G) wherever it exists: 50 steps along torch's derivative of torch's own norm."""
    o = point(name, *options)

    def gradient(G: Tensor) -> Tensor:
        G = G.detach().requires_grad_()
        return torch.autograd.grad(dual_norm(G), G)[0]

    assert follow(o, lambda twin: descend(weights(twin), float(o.lr), gradient), every_token=True) < ROUNDING


def test_sign_descent_is_adam_without_averages():
    """Tokens that a minibatch lacks have zero rows, where torch's Adam with ε = 0 is 0/0; ε = 1e-300 is below any
    gradient.
    """
    o = point("sign_descent")
    assert (
        follow(o, lambda twin: torch.optim.Adam(twin.parameters(), lr=float(o.lr), betas=(0.0, 0.0), eps=1e-300).step)
        < ROUNDING
    )


def test_normalized_sgd_is_sgd_on_gradients_clipped_to_norm_one():
    """Per tensor, by torch's clip_grad_norm_, which only shrinks (the loss is scaled up) and adds 1e-6 to the norm."""
    o = point("normalized_sgd")

    def oracle(twin: Net) -> Step:
        sgd = torch.optim.SGD(twin.parameters(), lr=float(o.lr))

        def step() -> None:
            for p in twin.parameters():
                assert torch.nn.utils.clip_grad_norm_([p], 1.0) > 1
            sgd.step()

        return step

    assert follow(o, oracle, scale=1e6) < EPSILON


def test_sgd_is_torchs_with_its_learning_rate_times_one_minus_beta():
    """torch sums gradients where ours averages them."""
    o = point("sgd")
    assert o.beta > 0
    oracle = lambda twin: torch.optim.SGD(twin.parameters(), lr=float(o.lr) * (1 - o.beta), momentum=o.beta).step  # noqa: E731
    assert follow(o, oracle) < ROUNDING


def test_shampoo_without_accumulation_is_two_inverse_fourth_roots():
    """(G Gᵀ)^(-1/4) G (Gᵀ G)^(-1/4) by eigh, with pseudo-inverse powers where tokens are missing and G lacks rank."""
    o = point("shampoo")

    def inverse_fourth_root(A: Tensor) -> Tensor:
        values, Q = torch.linalg.eigh(A)
        return Q * torch.where(values > 1e-13 * values[-1], values, torch.inf) ** -0.25 @ Q.T

    assert (
        follow(
            o,
            lambda twin: descend(
                weights(twin), float(o.lr), lambda G: inverse_fourth_root(G @ G.T) @ G @ inverse_fourth_root(G.T @ G)
            ),
        )
        < SQUARED
    )


def test_shampoo_without_accumulation_is_published_code_made_anew_at_every_step():
    """Its accumulators start at 1e-6 times the identity, negligible beside G Gᵀ of a loss scaled up."""
    o = point("shampoo")
    oracle = lambda twin: lambda: pytorch_optimizer.Shampoo(twin.parameters(), lr=float(o.lr), matrix_eps=1e-6).step()  # noqa: E731
    assert follow(o, oracle, scale=1e6) < SQUARED


# ---- Muon and its kin


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("form", ["auto", "plain", "gram"])
def test_spectral_descent_is_muon_without_momentum(form: str):
    o = point("spectral_descent", "--optim.polar.form", form)

    def oracle(twin):
        return torch.optim.Muon(twin.parameters(), lr=float(o.lr), weight_decay=0.0, momentum=0.0, nesterov=False).step

    assert follow(o, oracle) < ROUNDING


def muon(o: OptimConfig, twin: Net, adjust: str) -> Step:
    """torch's Muon on hidden weights; embedding and head along the sign of the update of torch's Nesterov SGD, the
    head's over its fan-in.
    """
    lr, hidden, rest = float(o.lr), [twin.attention.weight, twin.mlp.weight], [twin.embedding.weight, twin.head.weight]
    spectral = torch.optim.Muon(hidden, lr=lr, weight_decay=o.weight_decay, momentum=o.beta, adjust_lr_fn=adjust)
    nesterov = partial(torch.optim.SGD, lr=1.0, momentum=o.beta, nesterov=True)
    steps = [
        spectral.step,
        *(
            resized([p], nesterov, lambda u, size=size: lr * size * u.sign())
            for p, size in zip(rest, (1, 1 / 6), strict=True)
        ),
    ]

    def step() -> None:
        with torch.no_grad():
            for p in rest:
                p.mul_(1 - lr * o.weight_decay)
        for each in steps:
            each()

    return step


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("name", "adjust"), [("muon", "original"), ("moonlight", "match_rms_adamw")])
def test_muon_and_moonlight_are_torchs_muon(name: str, adjust: str):
    """Every token is in every minibatch: Muon and Adam move a row on its old momentum alone, ours does not."""
    o = point(name)
    assert (o.direction, o.beta, o.weight_decay > 0) == ("nesterov", 0.95, name == "moonlight")
    assert follow(o, lambda twin: muon(o, twin, adjust), every_token=True) < ROUNDING


def test_a_step_of_torchs_muon_in_bfloat16_is_ours_within_bfloat16():
    o = point("muon", "--optim.lr", "1")
    model, twin = Net().float(), Net().float()
    for net in (model, twin):
        backward(net, 0, every_token=True)
    build(o, model).step()
    torch.optim.Muon([twin.attention.weight, twin.mlp.weight], lr=1.0, weight_decay=0.0).step()
    low, high = o.polar.band
    for name, scale in (("attention.weight", (15 / 6) ** 0.5), ("mlp.weight", 1.0)):
        mine, theirs = ((Net().float().get_parameter(name) - net.get_parameter(name)) / scale for net in (model, twin))
        assert (mine - theirs).norm() < BFLOAT16 * mine.norm()
        for update in (mine, theirs):
            singular = torch.linalg.svdvals(update)
            assert low * (1 - BFLOAT16_BAND) < singular[-1] and singular[0] < high * (1 + BFLOAT16_BAND)


SCION = {
    "embedding": ("COL", {"transpose": True}),
    "attention": ("SPECTRAL", {}),
    "mlp": ("SPECTRAL", {}),
    "head": ("SIGN", {}),
}


def scion(twin: Net, *, lr: float, beta: float, radii: dict[str, float], constraint: bool) -> Step:
    groups = [
        {
            "params": [twin.get_parameter(f"{role}.weight")],
            "norm_type": published_scion.LMONorm[kind],
            "norm_kwargs": options,
            "scale": radii[role],
        }
        for role, (kind, options) in SCION.items()
    ]
    return pytorch_optimizer.SCION(groups, lr=lr, momentum=1 - beta, constraint=constraint).step


@pytest.mark.usefixtures("in_float64")
def test_constrained_scion_is_weight_decay_of_one_over_the_radius():
    """W ← (1 − γ) W − γ ρ LMO: our lr is γ ρ, our weight_decay 1/ρ."""
    o = point("scion")
    rho = 1 / o.weight_decay
    oracle = partial(scion, lr=float(o.lr) / rho, beta=o.beta, radii=dict.fromkeys(SCION, rho), constraint=True)
    assert follow(o, oracle, scale=1e6, every_token=True) < EPSILON


@pytest.mark.usefixtures("in_float64")
def test_unconstrained_scion_is_the_same_without_decay():
    o = point("scion", "--optim.weight-decay", "0")
    oracle = partial(scion, lr=float(o.lr), beta=o.beta, radii=dict.fromkeys(SCION, 1.0), constraint=False)
    assert follow(o, oracle, scale=1e6, every_token=True) < EPSILON


@pytest.mark.usefixtures("in_float64")
def test_scions_radii_by_layer_are_parameter_groups():
    o, gamma = point("scion"), 0.01
    radii = {"embedding": 1.0, "attention": 3.0, "mlp": 3.0, "head": 10.0}

    def grouped(o: OptimConfig, model: Net) -> Dualized:
        whole = build(o, model)
        sized = [(name, p, radii[name.split(".")[0]]) for name, p in model.named_parameters()]
        groups = [{"params": [(name, p)], "lr": gamma * r, "weight_decay": 1 / r} for name, p, r in sized]
        return Dualized(groups, 1.0, norm=whole.norm, direction=o.direction, beta=o.beta)  # type: ignore[arg-type]

    oracle = partial(scion, lr=gamma, beta=o.beta, radii=radii, constraint=True)
    assert follow(o, oracle, mine=grouped, scale=1e6, every_token=True) < EPSILON


# ---- Prodigy


# Recorded with prodigyopt 1.1.2, whose code is not installed here; this file's Net and backward:
#   net = Net(); theirs = prodigyopt.Prodigy(net.parameters(), betas=(0.0, 0.0), d0=1e-6, eps=1e-300)
#   for t in range(50): backward(net, t); theirs.step(); print(t + 1, theirs.param_groups[0]["d"])
#   print([p.sum().item() for p in net.parameters()])
PRODIGY_D = {
    6: 1.3781684738259675e-06,
    12: 6.559695538892976e-06,
    18: 4.094945572423729e-05,
    24: 0.0002096638475911753,
    30: 0.0012596909651356053,
    36: 0.0062524128337472186,
    42: 0.013968877898965051,
    48: 0.02875505280706925,
}
PRODIGY_SUMS = [4.694809992231333, 5.655732208490764, -3.249364960643027, 0.5549731993064293]


def test_prodigy_is_published_code_without_averages():
    """prodigyopt with β₁ = 0 steps by d as grown in the same step, as ours does (with β₁ > 0 by d of the step before:
    see the next test).
    """
    o, model = point("prodigy", "--optim.auto.initial", "1e-6"), Net()
    optimizer = build(o, model)
    for t in range(STEPS):
        backward(model, t)
        optimizer.step()
        if t + 1 in PRODIGY_D:
            assert optimizer.step_size == pytest.approx(PRODIGY_D[t + 1], rel=RECORDED)
    assert [p.sum().item() for p in model.parameters()] == pytest.approx(PRODIGY_SUMS, rel=RECORDED)


def test_prodigy_of_the_other_published_code_grows_alike_and_steps_one_late():
    """pytorch_optimizer's: on the same weights and gradient its d becomes our η, but it has stepped by the d before."""
    o, model, twin = point("prodigy", "--optim.auto.initial", "1e-6"), Net(), Net()
    optimizer = build(o, model)
    theirs = pytorch_optimizer.Prodigy(twin.parameters(), betas=(0.0, 0.0), beta3=0.0, d0=1e-6, eps=1e-300)
    for t in range(STEPS):
        model.load_state_dict(twin.state_dict())
        before, d = copy.deepcopy(weights(twin)), theirs.param_groups[0]["d"]
        for net in (model, twin):
            backward(net, t)
        optimizer.step()
        theirs.step()
        assert optimizer.step_size == pytest.approx(theirs.param_groups[0]["d"], rel=SINGLE)
        assert max((p - q).abs().max().item() for p, q in zip(weights(twin), before, strict=True)) == pytest.approx(
            d, rel=1e-9
        )
    assert d > 1e-3, "a thousandfold growth is compared"


MODULAR = (
    "--optim.composition modular --optim.norms.embedding L1ToRMS --optim.norms.attention RMSToRMS "
    "--optim.norms.mlp RMSToRMS --optim.norms.head RMSToLinf --optim.polar.schedule exact"
)


@pytest.mark.parametrize("options", ["", MODULAR])
def test_the_escape_velocity_is_at_most_the_distance_travelled(options: str):
    """Hölder: ⟨g, w₀ − w⟩ ≤ ‖g‖† ‖w₀ − w‖, in the norm of the point and in the modular norm."""
    o, model = point("prodigy", *options.split()), Net()
    optimizer, start, furthest = build(o, model), dict(Net().named_parameters()), o.auto.initial
    for t in range(STEPS):
        furthest = max(
            furthest, optimizer.norm.norm({n: (start[n] - p).detach() for n, p in model.named_parameters()}).item()
        )
        backward(model, t)
        optimizer.step()
        eta = optimizer.step_size
        assert eta is not None and eta <= furthest * (1 + ROUNDING)
    assert furthest > 10 * o.auto.initial, "it has grown"


# ---- directions


def lion(o: OptimConfig, twin: Net) -> pytorch_optimizer.Lion:
    return pytorch_optimizer.Lion(twin.parameters(), lr=float(o.lr), betas=(o.beta, o.beta2))


def test_lion_is_published_code_bit_for_bit():
    o = point("lion")
    assert follow(o, lambda twin: lion(o, twin).step, every_token=True) == 0


def test_lion_with_missing_tokens_is_published_code_that_leaves_their_rows_alone():
    o = point("lion")

    def oracle(twin: Net) -> Step:
        theirs = lion(o, twin)

        def step() -> None:
            rows = [(x, x.clone(), p.grad != 0) for p in weights(twin) for x in (p.data, *theirs.state[p].values())]  # type: ignore[operator]
            theirs.step()
            for x, before, seen in rows:
                x.copy_(torch.where(seen.any(-1, keepdim=True), x, before))

        return step

    assert follow(o, oracle) == 0


def test_adam_is_torchs_with_every_update_at_frobenius_norm_lr():
    """Its bias corrections rescale a tensor as a whole, so nothing of them is left."""
    o = point("adam")
    adam = partial(torch.optim.Adam, betas=(o.beta, o.beta2), eps=1e-300)

    def unit(u: Tensor) -> Tensor:
        return float(o.lr) * nn.functional.normalize(u, dim=(0, 1))  # type: ignore[arg-type]

    assert follow(o, lambda twin: resized(weights(twin), adam, unit)) < ROUNDING


class RenewsFirst(pytorch_optimizer.SOAP):
    """Published SOAP by its own functions, less the seven differences that the test names."""

    def project(
        self, grad: Tensor, state: dict, *args: object, project_type: str = "forward", **kwargs: object
    ) -> Tensor:
        if project_type == "backward":  # the quotients' way back
            rms, limit = state["exp_avg_sq"] ** 0.5, (1 - self.param_groups[0]["betas"][1]) ** -0.5
            share = (rms.maximum((grad * rms).abs()) / (ROOT_EPS * rms.amax()) - 1).clamp(0, 1)
            grad = torch.where(share > 0, grad.clamp(-limit, limit) * share, 0)
        return super().project(grad, state, *args, project_type=project_type, **kwargs)  # type: ignore[arg-type]

    def update_pre_conditioner(self, *args: object, **kwargs: object) -> None:
        """Within step(): not now."""

    def renew(self, step: int) -> None:
        for p in self.param_groups[0]["params"]:
            super().update_pre_conditioner(p.grad, self.state[p], step=step)

    def get_orthogonal_matrix_qr(self, state: dict, *args: object, **kwargs: object) -> list[Tensor]:
        shifted = [F + ROOT_EPS * F.diagonal().amax() * torch.eye(len(F), dtype=F.dtype) for F in state["GG"]]
        local, orders = {**state, "GG": shifted}, []

        def by_octave(values: Tensor, descending: bool) -> Tensor:
            largest = state["GG"][len(orders)].diagonal().amax()
            orders.append(torch.sort(-(values / largest * 2**0.25).log2().floor(), stable=True)[1])
            return orders[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "argsort", by_octave)
            sorted_bases = super().get_orthogonal_matrix_qr(local, *args, **kwargs)  # type: ignore[arg-type]
        back = [order.argsort() for order in orders]
        state["exp_avg_sq"] = local["exp_avg_sq"][back[0]][:, back[1]]
        return [Q[:, i] for Q, i in zip(sorted_bases, back, strict=True)]


ROOT_EPS = torch.finfo(torch.float64).eps ** 0.5


def cosines(o: OptimConfig, theirs: torch.optim.Optimizer, twin: Net, before_step: Callable[[int], object]) -> Tensor:
    """(STEPS, 4): cosine of our update with theirs of the same weights and gradients."""
    model, found = Net(), []
    optimizer = build(o, model)
    for t in range(STEPS):
        twin.load_state_dict(model.state_dict())
        start = copy.deepcopy(model)
        for net in (model, twin):
            backward(net, t)
        before_step(t)
        optimizer.step()
        theirs.step()
        moved = [[(w - p).detach() for w, p in zip(weights(start), weights(net), strict=True)] for net in (model, twin)]
        found.append(
            [nn.functional.cosine_similarity(u.flatten(), v.flatten(), dim=0) for u, v in zip(*moved, strict=True)]
        )
    return torch.tensor(found)


@pytest.mark.parametrize("every", [1, 10])
def test_soap_is_published_code_with_its_basis_renewed_before_the_step(every: int):
    """Seven differences are taken out. Published code renews factors and basis after a step, rounds the basis to
    float32, and starts from eigenvectors; it does not shift factors, sorts columns by the last digits of their
    eigenvalues, divides whatever is not zero, and bounds no quotient. What is left is the same: factors, one step of
    orthogonal iteration, running squares in the new basis, the way back. Gradients lack rank, all of them those of
    the head, whose columns sum to 0.
    """
    o, twin = point("soap", "--optim.refresh-every", str(every)), Net()
    theirs = RenewsFirst(
        twin.parameters(), lr=1.0, betas=(o.beta, o.beta2), weight_decay=0.0, precondition_frequency=every, eps=1e-300
    )
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    theirs.step()  # its first one makes its state and no more
    for p in twin.parameters():
        theirs.state[p]["Q"] = [torch.eye(n, dtype=p.dtype) for n in p.shape]

    assert (1 - cosines(o, theirs, twin, lambda t: theirs.renew(t + every))).max() < TURNED


def test_soap_steps_in_about_the_direction_of_published_code_as_it_is():
    """With the differences: found 0.93 … 0.96 on the average of a tensor's steps."""
    o, twin = point("soap"), Net()
    theirs = pytorch_optimizer.SOAP(
        twin.parameters(), lr=1.0, betas=(o.beta, o.beta2), weight_decay=0.0, precondition_frequency=o.refresh_every
    )
    assert (cosines(o, theirs, twin, lambda t: None)[5:].mean(0) > 0.9).all()


# ---- the files


def test_points_differ_from_the_speedrun_in_their_optimizer_alone():
    def rest(path: Path) -> dict:
        return {k: v for k, v in tomllib.loads(path.read_text()).items() if k != "optim"}

    assert len(POINTS) == 12
    for path in POINTS.values():
        assert rest(path) == rest(ROOT / "configs/shakespeare_char.toml"), path


@pytest.mark.parametrize("name", POINTS)
def test_a_point_says_where_it_is_from_and_takes_the_plain_maximum(name: str):
    comment = POINTS[name].read_text().partition("[run]")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert re.search(r"arXiv \d{4}\.\d{4,5}|kellerjordan.github.io", comment)
    assert f"configs/points/{name}.toml" in comment, "the command of its learning rate"
    assert point(name).composition == "max"


TRAIN_ALL = """
import sys, traceback
import train_gpt
for arguments in map(str.split, sys.argv[1:]):
    try:
        train_gpt.main(arguments)
    except Exception:
        traceback.print_exc()
"""
SMALL = (
    "--data.dataset corpora/small --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 4 --train.steps 3"
    " --train.log-every 1 --train.eval-tokens 64 --train.sample-tokens 0 --train.no-pictures --run.threads 1 --run.device cpu"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of train_gpt.py with every point, in one process: importing takes longer than training."""
    root = tmp_path_factory.mktemp("points")
    small_dataset(root)
    (root / "train_all.py").write_text(TRAIN_ALL)
    for name, path in POINTS.items():
        (root / f"{name}.toml").write_text(path.read_text())
    code, _, err = run(
        root, *(f"{name}.toml --run.name {name} {SMALL}" for name in POINTS), script=str(root / "train_all.py")
    )
    assert (code, "Traceback" in err) == (0, False), err
    return root / "runs"


@pytest.mark.parametrize("name", POINTS)
def test_a_point_trains_and_its_receipt_has_its_norms(trained: Path, name: str):
    records = [json.loads(line) for line in (trained / name / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert len(set(losses)) == 3, "it moves"
    o, n_head = point(name), 2
    expected = {role: str(norm) for role, norm in o.norms.build(o.polar, n_head).items()}
    table = [
        re.split(r"  +", line)
        for line in (trained / name / "receipt.txt").read_text().split("\nnote:")[0].splitlines()[1:9]
    ]
    assert len(table) == 8, "embedding, six matrices of the layer, head"
    for _, _, role, norm, _, radius, _ in table:
        assert (norm, radius) == (expected[role], "1")


def test_nesterov_soap_is_soap_of_the_average_one_step_ahead():
    """SOAP that starts from the new average M' instead of M averages to (1 − β) G + β M'; everything else it remembers
    is the same.
    """
    from optim.directions import DIRECTIONS

    g = torch.Generator().manual_seed(0)
    soap, ahead = DIRECTIONS["soap"], DIRECTIONS["nesterov_soap"]
    state = {k: b[None] for k, b in ahead.buffers(torch.zeros(6, 4, dtype=torch.float64)).items()}
    for step in range(4):
        G = torch.randn(1, 6, 4, generator=g, dtype=torch.float64)
        twin = {k: b.clone() for k, b in state.items()}
        settings = {"live": torch.ones((), dtype=G.dtype), "beta": 0.8, "beta2": 0.9, "refresh": step % 2 == 0}
        D = ahead(G.clone(), state, **settings)
        twin["momentum"] = state["momentum"].clone()
        same = soap(G.clone(), twin, **settings)
        if step:  # the first gradient's eigenbasis makes it diagonal: beside that, rounding over rounding
            assert torch.allclose(same, D, atol=1e-9)
        assert all(torch.equal(twin[k], state[k]) for k in state if k != "momentum")
