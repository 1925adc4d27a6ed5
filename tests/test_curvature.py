"""optim/curvature.py.

Oracles: dense Hessians in forward mode, spectra that were put in, finite differences, enumeration of a box's faces,
projected ascent.
"""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from model import GPT, GPTConfig
from optim import ModularNorm, NonFiniteError
from optim.curvature import Hessian, ModularSharpness, along, eigenvalues, loss_smoothness, modular_sharpness
from optim.modular import Module, atom, bond
from optim.norms import Frobenius, L1ToRMS, MaxEntry, RMSToLinf, RMSToRMS
from optim.polar import Polar
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

EXACT = RMSToRMS(Polar("exact"))
ROUNDING = 1e-9  # of some hundred float64 operations on numbers of order 1 to 100
F32 = 1e-4  # of a product of Hessian and vector in float32, relative to the largest eigenvalue
PROJECTED = 1e-6  # what the projected ascent leaves
FLAT = 1e-12  # of a form's largest entry: thousands of roundings of an eigenvalue, a thousandth of ROUNDING
LOCAL = 1e-3  # a climb's tolerance, and as near to the true maximum as counts as attained


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- losses ------------------------------------------------------------------------------------------------------------


def gpt(dtype: torch.dtype = torch.float64, **options) -> tuple[GPT, Callable[[], Tensor]]:
    """A GPT and its loss on a batch of 2 × 6 tokens."""
    config = GPTConfig(
        **{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11, "zero_init": False} | options
    )
    model = GPT(config, generator=generator()).to(dtype)
    idx, target = torch.randint(11, (2, 2, 6), generator=generator(1))

    def loss() -> Tensor:
        value = model(idx, target)[1]
        assert value is not None
        return value

    return model, loss


def mlp(
    dtype: torch.dtype = torch.float64, middle: Callable[[int], nn.Module] = nn.PReLU
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Its loss is of a batch of 12. middle: of width 9."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), middle(9), nn.Linear(9, 5)).to(torch.float64)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=i))
    x, y = gaussian(12, 6, seed=7).to(dtype), torch.randint(5, (12,), generator=generator())
    model = model.to(dtype)
    return model, lambda: cross_entropy(model(x), y)


def dense(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], names: Sequence[str]) -> Tensor:
    """The Hessian in these weights, forward over reverse."""
    model, loss = make()
    weights = [model.get_parameter(k).detach() for k in names]

    def of(*parts: Tensor) -> Tensor:
        for k, part in zip(names, parts, strict=True):
            owner, _, leaf = k.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters.pop(leaf, None)
            setattr(module, leaf, part)
        return loss()

    indices = tuple(range(len(names)))
    with sdpa_kernel(SDPBackend.MATH):
        rows = jacfwd(jacrev(of, indices), indices)(*weights)
    return torch.cat(
        [torch.cat([b.reshape(w.numel(), -1) for b in row], 1) for row, w in zip(rows, weights, strict=True)]
    ).detach()


@dataclass
class Quadratic:
    """½ wᵀ A w + bᵀ w in tensors of these shapes, at w = start (0 if None)."""

    A: Tensor
    shapes: dict[str, tuple[int, ...]]
    b: Tensor | None = None

    def __post_init__(self) -> None:
        self.weights = {k: torch.zeros(s, dtype=self.A.dtype, requires_grad=True) for k, s in self.shapes.items()}
        self.b = torch.ones(len(self.A), dtype=self.A.dtype) if self.b is None else self.b

    def loss(self) -> Tensor:
        w = torch.cat([t.flatten() for t in self.weights.values()])
        assert self.b is not None
        return w @ self.A @ w / 2 + self.b @ w

    def hessian(self) -> Hessian:
        return Hessian(self.loss, self.weights)


def quadratic(A: Tensor) -> Hessian:
    return Quadratic(A, {"w": (len(A),)}).hessian()


def with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(gaussian(len(values), len(values), seed=seed))[0]
    A = Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def length(d: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in d.values()))


# -- the Hessian -------------------------------------------------------------------------------------------------------

GPT_NAMES = (
    "embedding.weight",
    "blocks.0.attention.q.weight",
    "blocks.1.attention.v.weight",
)  # a principal block, for the dense oracle's sake
NETWORKS = {"GPT": (gpt, GPT_NAMES), "MLP": (mlp, ("0.weight", "0.bias", "2.weight", "3.weight"))}


@pytest.mark.parametrize("name", NETWORKS)
def test_both_ends_of_the_spectrum_are_the_dense_hessians(name: str):
    make, names = NETWORKS[name]
    oracle = dense(make, names)
    assert torch.allclose(oracle, oracle.T, atol=ROUNDING)
    spectrum = torch.linalg.eigvalsh(oracle)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, F32)):
        model, loss = make(dtype)
        found = eigenvalues(
            Hessian(loss, {k: model.get_parameter(k) for k in names}), generator=generator(), tolerance=0, steps=60
        )
        assert found.largest == pytest.approx(float(spectrum[-1]), rel=tolerance)
        assert found.smallest == pytest.approx(float(spectrum[0]), rel=tolerance)


@pytest.mark.parametrize("make", [gpt, mlp, lambda: mlp(middle=nn.LayerNorm)], ids=["GPT", "MLP", "LayerNorm"])
def test_a_product_is_the_difference_of_gradients(make: Callable):
    """With a LayerNorm this is the only oracle: torch 2.13's forward mode gives it an asymmetric Hessian."""
    model, loss = make()
    weights = dict(model.named_parameters())
    d = {k: gaussian(*w.shape, seed=i) for i, (k, w) in enumerate(weights.items())}
    product = Hessian(loss, weights)(d)
    step, gradients = 1e-5, []  # error: step² of third derivatives, ε/step of rounding
    for sign in (1, -1):
        with torch.no_grad():
            moved = {k: w + sign * step * d[k] for k, w in weights.items()}
        model.load_state_dict(moved)
        gradients.append(torch.autograd.grad(loss(), list(weights.values())))
        model.load_state_dict({k: w - sign * step * d[k] for k, w in moved.items()})
    for k, plus, minus in zip(weights, *gradients, strict=True):
        assert torch.allclose(product[k], (plus - minus) / (2 * step), atol=1e-6 * length(product))


def test_a_direction_may_leave_names_out_and_the_quadratic_form_is_its_product():
    model, loss = mlp()
    hessian = Hessian(loss, dict(model.named_parameters()))
    d = {"3.weight": gaussian(5, 9)}
    full = {k: torch.zeros_like(w) for k, w in hessian.weights.items()} | d
    assert all(torch.equal(a, b) for a, b in zip(hessian(d).values(), hessian(full).values(), strict=True))
    assert hessian.quadratic(d) == pytest.approx(
        float(d["3.weight"].flatten() @ hessian(d)["3.weight"].flatten()), rel=ROUNDING
    )


def test_scales_are_those_of_another_parametrization():
    model, loss = mlp()
    weights, scales = (
        dict(model.named_parameters()),
        {"0.weight": 6**-0.5, "3.weight": 3.0, "3.bias": gaussian(5).exp()},
    )
    v = {k: (w / scales.get(k, 1)).detach().requires_grad_() for k, w in weights.items()}
    x, y = gaussian(12, 6, seed=7), torch.randint(5, (12,), generator=generator())
    other = Hessian(
        lambda: cross_entropy(functional_call(model, {k: scales.get(k, 1) * t for k, t in v.items()}, (x,)), y), v
    )
    scaled = Hessian(loss, weights, scales)
    d = scaled.random(generator())
    for ours, theirs in ((scaled.gradient, other.gradient), (scaled(d), other(d))):
        assert all(torch.allclose(ours[k], theirs[k], atol=ROUNDING) for k in weights)
    assert not torch.allclose(scaled(d)["0.weight"], Hessian(loss, weights)(d)["0.weight"])


def test_fused_attention_has_no_second_derivative_and_is_avoided():
    """On a CPU in float32 the GPT's attention is fused, and fails: the Hessian is another code path or it would fail
    too.
    """
    model, loss = gpt(torch.float32)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(), list(weights.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention.* is not implemented"):
        torch.autograd.grad([g.sum() for g in grads], list(weights.values()))
    hessian = Hessian(loss, weights)
    assert all(h.abs().sum() > 0 for h in hessian(hessian.gradient).values())


def test_weights_that_the_loss_does_not_use_get_zeros():
    used, unused = (torch.ones(3, requires_grad=True) for _ in range(2))
    for loss in (lambda: used.pow(3).sum(), lambda: used.sum(), lambda: torch.tensor(2.0)):
        hessian = Hessian(loss, {"used": used, "unused": unused})
        product = hessian({"used": torch.ones(3), "unused": torch.ones(3)})
        assert not hessian.gradient["unused"].any() and not product["unused"].any()
        assert torch.equal(product["used"], 6 * torch.ones(3) if hessian.gradient["used"][0] == 3 else torch.zeros(3))


@pytest.mark.parametrize("zero_init", [True, False])
def test_dropout_is_refused_even_where_loss_and_gradient_stay_the_same(zero_init: bool):
    """With output projections of zeros, what is dropped is 0."""
    model, loss = gpt(dropout=0.1, zero_init=zero_init)
    assert (loss() == loss()) == zero_init
    with pytest.raises(
        ValueError, match=r"(?s)^Hessian of a loss.*got: one that draws random numbers.*fix: model\.eval\(\)"
    ):
        Hessian(loss, dict(model.named_parameters()))
    model.eval()
    Hessian(loss, dict(model.named_parameters()))


@pytest.mark.parametrize("zero_init", [True, False])
def test_a_changing_batch_is_refused_even_where_the_loss_stays_the_same(zero_init: bool):
    """With a head of zeros every batch has the loss log V."""
    model, _ = gpt(zero_init=zero_init)
    batches = iter(torch.randint(11, (9, 2, 2, 6), generator=generator()))
    with pytest.raises(
        ValueError, match=r"(?s)^Hessian of a loss.*got: .*, then .* away\n  allowed: a loss that gives the same twice"
    ):
        Hessian(lambda: model(*next(batches))[1], dict(model.named_parameters()))


def test_numbers_that_are_not_finite_are_named():
    w, v = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for loss, message in (
        (lambda: (v / w).sum(), "^the loss is inf"),
        (lambda: v.sum() + w.sqrt().sum(), "^the gradient of a.w "),
        (lambda: v.square().sum() + w.pow(1.5).sum(), "^the Hessian's product of a.w "),
    ):
        with pytest.raises(NonFiniteError, match=message):
            Hessian(loss, {"a.v": v, "a.w": w})({"a.w": torch.ones(2)})


def test_what_cannot_be_differentiated_is_refused():
    w = torch.ones(2, requires_grad=True)
    for weights, scales, got in (
        ({}, None, "no weights"),
        ({"w": torch.ones(2)}, None, "'w', which requires no gradient"),
        ({"w": w}, {"u": 2.0}, "a scale for 'u', which is no weight"),
        ({"w": w}, {"w": torch.ones(3)}, "a scale of another shape than 'w'"),
        ({"w": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}, None, "weights of torch.bfloat16 on cpu"),
        (
            {"w": w, "v": torch.ones(2, dtype=torch.float64, requires_grad=True)},
            None,
            "weights of torch.float32 on cpu, torch.float64 on cpu",
        ),
    ):
        with pytest.raises(ValueError, match=rf"(?s)^Hessian\n  got: {got}\n  allowed: .*\n  fix: "):
            Hessian(lambda: w.sum(), weights, scales)
    with pytest.raises(ValueError, match=r"(?s)got: shape \(2,\).*allowed: a scalar"):
        Hessian(lambda: w, {"w": w})
    hessian = Hessian(lambda: w.square().sum(), {"w": w})
    for d, allowed in (({"w": torch.ones(3)}, r"\(2,\)"), ({"u": torch.ones(2)}, "w")):
        with pytest.raises(ValueError, match=rf"(?s)^direction .*allowed: {allowed}\n  fix: "):
            hessian(d)


def test_the_graph_goes_with_the_object():
    kept: list[weakref.ref] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output that its own node saves would be a cycle
            kept.append(weakref.ref(self))

    model, loss = mlp()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            hessian = Hessian(loss, dict(model.named_parameters()))
        assert any(ref() for ref in kept)
        del hessian
        assert not any(ref() for ref in kept)
    finally:
        gc.enable()


# -- eigenvalues -------------------------------------------------------------------------------------------------------

SPECTRA = {
    "positive": [float(k) for k in range(1, 13)],
    "negative": [-float(k) for k in range(1, 13)],
    "indefinite": [-7.0, -1.0, 0.0, 0.5, 3.0],
    "a degenerate top": [5.0, 5.0, 5.0, 1.0, -2.0],
    "rank one": [4.0] + [0.0] * 9,
    "negative rank one": [-4.0] + [0.0] * 199,
    "up to zero": [-5.0, -3.0, -1.0, 0.0],
    "zero": [0.0] * 6,
    "identity": [1.0] * 6,
    "one entry": [-3.0],
    "tiny": [2e-12, 1e-12, -1e-12],
    "huge": [2e12, 1e12, -1e12],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_spectrum_that_was_put_in_is_found(name: str):
    values = SPECTRA[name]
    hessian = quadratic(with_spectrum(values))
    found = eigenvalues(hessian, generator=generator(), tolerance=1e-10)
    scale = max(map(abs, values))
    # One more, where the largest is 0: what remains after the last is then compared with 0, and products of 200 terms
    # may leave more than ROUNDINGS.
    assert found.converged and found.steps <= len(set(values)) + (max(values) == 0)
    assert found.largest == pytest.approx(max(values), abs=ROUNDING * scale)
    assert found.smallest == pytest.approx(min(values), abs=ROUNDING * scale)
    assert length(found.vector) == pytest.approx(1, rel=ROUNDING)
    assert torch.allclose(
        hessian(found.vector)["w"], max(values) * found.vector["w"], atol=1e-6 * scale
    )  # converged: its residual, not its square


def test_residuals_bound_errors_and_unconverged_is_said():
    values = torch.linspace(-3, 5, 200, dtype=torch.float64)
    hessian = quadratic(torch.diag(values))
    errors = []
    for steps in (1, 3, 10, 30, 60):
        found = eigenvalues(hessian, generator=generator(), steps=steps, tolerance=1e-3)
        assert found.steps <= steps and -3 - ROUNDING <= found.smallest <= found.largest <= 5 + ROUNDING
        assert (values - found.largest).abs().min() <= found.largest_residual + ROUNDING
        assert (values - found.smallest).abs().min() <= found.smallest_residual + ROUNDING
        residual = hessian.flat(hessian(found.vector)) - found.largest * hessian.flat(found.vector)
        assert float(residual.norm()) == pytest.approx(found.largest_residual, abs=ROUNDING)
        assert found.converged == (found.largest_residual <= 1e-3 * found.largest)
        errors.append(5 - found.largest)
    assert (
        not eigenvalues(hessian, generator=generator(), steps=3).converged
        and errors == sorted(errors, reverse=True)
        and errors[-1] < 1e-3
    )


def test_the_same_generator_gives_the_same_numbers():
    hessian = quadratic(with_spectrum(SPECTRA["positive"]))
    first, again = (eigenvalues(hessian, generator=generator(3), steps=4) for _ in range(2))
    other = eigenvalues(hessian, generator=generator(4), steps=4)
    assert first.largest == again.largest != other.largest


# -- the largest curvature in a modular norm ---------------------------------------------------------------------------

# Of the true maxima, the fraction that is to be attained. Seen: 0.85 to 1, and 0.5 of mostly negative ones, where
# climbs end early, a few percent below.
KINDS = {"positive semidefinite": 0.8, "of rank 3": 0.8, "indefinite": 0.6, "mostly negative": 0.4}
PROBLEMS = 20
FAR = 0.9  # of the maximum: never below
SMALL = ModularNorm({"W": EXACT, "E": L1ToRMS(), "s": MaxEntry()}, {"W": 1.0, "E": 0.5, "s": 0.7})
SHAPES: dict[str, tuple[int, ...]] = {"W": (2, 2), "E": (2, 2), "s": (2,)}


def symmetric(n: int, kind: str, seed: int) -> Tensor:
    A = gaussian(n, n, seed=seed)
    plus = {"positive semidefinite": n, "of rank 3": 3, "indefinite": n // 2, "mostly negative": max(1, n // 5)}[kind]
    minus = 0 if kind in ("positive semidefinite", "of rank 3") else n
    return A[:, :plus] @ A[:, :plus].T - A[:, plus:minus] @ A[:, plus:minus].T


def nearest(X: Tensor) -> Tensor:
    """(draws, n) → the nearest points of SMALL's unit ball: singular values, rows and entries cut off."""
    W, E, s = X[:, :4].reshape(-1, 2, 2), X[:, 4:8].reshape(-1, 2, 2), X[:, 8:]
    U, S, Vh = torch.linalg.svd(W)
    W = U @ torch.diag_embed(S.clamp(max=1)) @ Vh
    E = E / (E.norm(dim=-1, keepdim=True) / (0.5 * 2**0.5)).clamp(min=1)
    return torch.cat([W.flatten(1), E.flatten(1), s.clamp(-0.7, 0.7)], 1)


def by_projection(A: Tensor, *, starts: int = 60, steps: int = 150) -> float:
    """max xᵀAx over SMALL's unit ball: projected gradient ascent from many points."""
    X, step = nearest(2 * gaussian(starts, len(A))), 1.5 / torch.linalg.eigvalsh(A).abs().max()
    for _ in range(steps):
        X = nearest(X + step * X @ A)
    return max(0.0, float(((X @ A) * X).sum(1).max()))


def by_faces(A: Tensor) -> float:
    """max xᵀAx over [−1, 1]ⁿ, by the stationary points of the faces on which the form is strictly concave, corners
    among them.

    A maximum inside of a face is stationary there and the form concave. Along a direction in which it is flat it
    stays the maximum up to where the direction leaves the face, on a smaller one: of all maxima, one on a smallest
    face has no such direction. What is flatter than FLAT counts as flat, since the form changes by no more than 4n ·
    FLAT of its largest entry on the way. Every x is in the box, so that nothing exceeds the maximum.
    """
    best, n = 0.0, len(A)
    for free in itertools.product((False, True), repeat=n):
        F, fixed = torch.tensor(free), n - sum(free)
        if F.any() and torch.linalg.eigvalsh(A[F][:, F])[-1] > -FLAT * A.abs().max():
            continue
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=fixed)), dtype=A.dtype).reshape(2**fixed, fixed)
        X = torch.zeros(2**fixed, n, dtype=A.dtype)
        X[:, ~F] = signs
        if F.any():
            inside = torch.linalg.solve(A[F][:, F], -A[F][:, ~F] @ signs.T).T
            X[:, F] = inside.where(
                (inside.abs() <= 1).all(1, keepdim=True), 0.0
            )  # others: any point of the box will do
        best = max(best, float(((X @ A) * X).sum(1).max()))
    return best


def by_signs(A: Tensor) -> float:
    """max xᵀAx over [−1, 1]ⁿ of a positive semidefinite A: a corner."""
    X = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(A))), dtype=A.dtype)
    return float(((X @ A) * X).sum(1).max())


def climb(
    A: Tensor, norm: ModularNorm, shapes: dict[str, tuple[int, ...]], **options
) -> tuple[Hessian, ModularSharpness]:
    hessian = Quadratic(A, shapes).hessian()
    return hessian, modular_sharpness(hessian, norm, **{"generator": generator(), "restarts": 3} | options)


def ratios(found: Sequence[float], true: Sequence[float]) -> Tensor:
    """Found over true maxima; 1 where both are 0."""
    return torch.tensor([f / t if t else 1 + f for f, t in zip(found, true, strict=True)], dtype=torch.float64)


def attained(r: Tensor) -> float:
    print(f"{int((r >= 1 - LOCAL).sum())} of {len(r)}, lowest {float(r.min()):.4f}", end=" ")
    return float((r >= 1 - LOCAL).double().mean())


@pytest.mark.parametrize(
    ("kind", "oracle", "size"), [("positive semidefinite", by_signs, 10), *((kind, by_faces, 5) for kind in KINDS)]
)
def test_the_largest_curvature_among_signs_is_that_of_all_corners_or_faces(
    kind: str, oracle: Callable[[Tensor], float], size: int
):
    shapes: dict[str, tuple[int, ...]] = {"a": (size // 2,), "b": (size - size // 2,)}
    radii = {"a": 1.0, "b": 0.3}
    scale = torch.cat([torch.full(shapes[k], r, dtype=torch.float64) for k, r in radii.items()])
    norm = ModularNorm(dict.fromkeys(shapes, MaxEntry()), radii)
    problems = [symmetric(size, kind, seed) for seed in range(PROBLEMS)]
    r = ratios(
        [climb(A, norm, shapes, restarts=10)[1].value for A in problems],
        [oracle(scale[:, None] * A * scale) for A in problems],
    )
    assert attained(r) >= KINDS[kind] and r.min() >= FAR and r.max() <= 1 + ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_curvature_of_a_matrix_an_embedding_and_gains_is_that_of_projected_ascent(kind: str):
    problems = [symmetric(10, kind, seed) for seed in range(PROBLEMS)]
    r = ratios([climb(A, SMALL, SHAPES)[1].value for A in problems], [by_projection(A) for A in problems])
    assert attained(r) >= KINDS[kind] and r.min() >= FAR and r.max() <= 1 + PROJECTED


@pytest.mark.parametrize("name", SPECTRA)
def test_in_the_frobenius_norm_it_is_the_largest_eigenvalue_or_0(name: str):
    values = SPECTRA[name]
    hessian = quadratic(with_spectrum(values))
    found = modular_sharpness(
        hessian, ModularNorm({"w": Frobenius(1)}, {"w": 2.0}), generator=generator(), tolerance=1e-6, steps=100
    )
    assert found.value == pytest.approx(4 * max(0, *values, 0), rel=1e-5, abs=ROUNDING * max(map(abs, values)))


class Astray(MaxEntry):
    """Its steps go elsewhere."""

    def dualize(self, G: Tensor) -> Tensor:
        return super().dualize(G).roll(1, -1)


@pytest.mark.parametrize("gains", [MaxEntry(), Astray()], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_more_steps_never_lower_the_value(seed: int, gains: MaxEntry):
    norm = replace(SMALL, norms=SMALL.norms | {"s": gains}, radii=SMALL.radii | {"s": 3.0})
    found = [climb(symmetric(10, "indefinite", seed), norm, SHAPES, steps=steps)[1] for steps in (1, 2, 3, 5, 8, 13)]
    for before, after in itertools.pairwise(found):
        assert all(a >= b - ROUNDING for a, b in zip(after.values, before.values, strict=True))
    assert max(after - before for before, after in zip(found[0].values, found[-1].values, strict=True)) > 1
    assert all(f.steps <= 13 * len(f.values) + 1 for f in found)


class Overshooting(MaxEntry):
    """What it takes for a step of norm 1 has norm 1.14, and it cannot tell."""

    def dualize(self, G: Tensor) -> Tensor:
        return 1.14 * super().dualize(G)

    def size(self, W: Tensor) -> Tensor:
        return super().size(W) / 1.14


@pytest.mark.parametrize(
    "rough", [RMSToRMS(Polar("jordan")), RMSToRMS(Polar("polar_express")), RMSToRMS(Polar("cubic"))], ids=str
)
def test_an_approximate_polar_factor_leaves_a_lower_bound_and_hardly_lowers_it(rough: RMSToRMS):
    shapes: dict[str, tuple[int, ...]] = {"W": (6, 4), "V": (3, 6)}
    radii = {"W": 1.0, "V": 0.4}
    norm, true = (ModularNorm(dict.fromkeys(shapes, each), radii) for each in (rough, EXACT))
    for seed in range(3):
        A = symmetric(42, "positive semidefinite", seed)
        hessian, found = climb(A, norm, shapes)
        assert true.norm(found.direction) <= 1 + ROUNDING
        assert hessian.quadratic(found.direction) == pytest.approx(found.value, rel=ROUNDING)
        assert found.value >= 0.97 * climb(A, true, shapes)[1].value  # another local maximum, at worst


def test_a_norm_whose_steps_are_too_large_leaves_a_lower_bound():
    A = symmetric(6, "positive semidefinite", 0)
    shapes: dict[str, tuple[int, ...]] = {"a": (6,)}
    found = climb(A, ModularNorm({"a": Overshooting()}, {"a": 1.0}), shapes)[1]
    assert found.direction["a"].abs().max() <= 1 + ROUNDING
    assert 0.9 * by_signs(A) <= found.value <= by_signs(A) * (1 + ROUNDING)


def test_nothing_curves_more_than_no_step_where_the_loss_is_concave():
    found = climb(-symmetric(10, "positive semidefinite", 0), SMALL, SHAPES)[1]
    assert (
        found.value == 0 == found.spread
        and not any(d.any() for d in found.direction.values())
        and set(found.values) == {0.0}
    )


def test_a_weight_of_radius_0_does_not_move_and_one_without_a_norm_is_refused():
    A = symmetric(10, "positive semidefinite", 0)
    still = replace(SMALL, radii=SMALL.radii | {"W": 0.0})
    moved, found = climb(A, SMALL, SHAPES)[1], climb(A, still, SHAPES)[1]
    assert not found.direction["W"].any() and found.direction["E"].any() and 0 < found.value < moved.value
    with pytest.raises(ValueError, match=r"^a tensor without a norm\n  got: 'E'\n  allowed: W\n  fix: "):
        climb(A, ModularNorm({"W": EXACT}, {"W": 1.0}), SHAPES)


def test_of_a_network_it_exceeds_what_the_eigenvector_and_many_random_steps_have():
    model, loss = gpt()
    norm = ModularNorm.of(model.structure())
    hessian = Hessian(loss, dict(model.named_parameters()))
    top = eigenvalues(hessian, generator=generator())
    found = modular_sharpness(hessian, norm, generator=generator(), top=top)
    others = [norm.normalize(hessian.random(generator(seed))) for seed in range(30)] + [norm.normalize(top.vector)]
    assert found.converged and found.value > max(map(hessian.quadratic, others))
    assert found.value >= top.largest / float(norm.norm(top.vector)) ** 2
    assert (
        len(found.values) == 4 and 0 <= found.spread < 0.2 and max(found.values) == pytest.approx(found.value, rel=1e-5)
    )


# -- along the step, and the bound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("polar", ["exact", "polar_express"])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_beyond_the_stable_one_raises_a_quadratic_and_one_below_it_lowers_it(polar: str, seed: int):
    norm = ModularNorm({"W": RMSToRMS(Polar(polar)), "E": L1ToRMS(), "s": MaxEntry()}, SMALL.radii)
    problem = Quadratic(symmetric(10, "positive semidefinite", seed), SHAPES, gaussian(10, seed=9 + seed))
    hessian = problem.hessian()
    found = along(hessian, norm)
    d, start = norm.dualize(hessian.gradient), hessian.value

    def after(lr: float) -> float:
        with torch.no_grad():
            for k, w in problem.weights.items():
                w.copy_(-lr * d[k])
            return float(problem.loss())

    assert after(0.999 * found.stable_lr) < start < after(1.001 * found.stable_lr)
    assert after(0.5 * found.stable_lr) < min(
        after(0.45 * found.stable_lr), after(0.55 * found.stable_lr)
    )  # the middle is lowest
    inner = sum(float((hessian.gradient[k] * d[k]).sum()) for k in d)
    assert found.dual_norm == pytest.approx(inner, rel=1e-6 if polar == "exact" else 0.2)
    assert found.stable_lr == pytest.approx(2 * inner / found.curvature, rel=ROUNDING)


def test_no_step_is_too_large_where_the_loss_is_concave_along_it():
    found = along(Quadratic(-torch.eye(10, dtype=torch.float64), SHAPES).hessian(), SMALL)
    assert found.curvature < 0 and found.stable_lr == math.inf


def chain(scale: float) -> tuple[ModularNorm, Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """scale · head ∘ map ∘ embedding, masses 1, 1, 2, and its cross-entropy for every token as input and the next one
    as target.
    """
    tree: Module = (scale * atom("head", RMSToLinf())) @ atom("map", EXACT) @ atom("embedding", L1ToRMS(), mass=2)

    def loss(w: dict[str, Tensor], target: Tensor) -> Tensor:
        return cross_entropy(scale * (w["embedding"] @ w["map"].mT @ w["head"].mT), target)

    return ModularNorm.of(tree), loss


@pytest.mark.parametrize("scale", [0.5, 1.0, 10.0])
def test_no_curvature_exceeds_the_bound_derived_from_the_tree(scale: float):
    """Of either sign, at random weights in their unit balls, logit scales included."""
    vocab, width = 3, 4
    norm, loss = chain(scale)
    bound = loss_smoothness(norm)
    assert bound is not None
    largest, target = 0.0, torch.arange(vocab).roll(1)
    for seed in range(6):
        shapes = {"head": (vocab, width), "map": (width, width), "embedding": (vocab, width)}
        draws = {k: norm.norms[k].dualize(gaussian(*s, seed=seed)) for k, s in shapes.items()}
        w = {
            k: (t * (seed % 4 + 1) / 4 * (1 if k != "head" else (seed % 3) / 2)).requires_grad_()
            for k, t in draws.items()
        }
        for sign in (1, -1):
            hessian = Hessian(lambda w=w, sign=sign: sign * loss(w, target), w)
            largest = max(largest, modular_sharpness(hessian, norm, generator=generator(), steps=15).value)
    print(f"{largest / bound:.3f} of the bound", end=" ")
    assert 0.0 < largest <= bound + ROUNDING


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_a_large_logit_scale_leaves_cross_entropys_own_curvature_and_it_is_attained(scale: float):
    """Two equal logits that every weight can part have τ's part of the bound: the variance of ±1 at probabilities of a
    half.
    """
    norm, loss = chain(scale)
    row = torch.eye(4, dtype=torch.float64)
    w = {"embedding": 2 * row[:1], "map": row.clone(), "head": torch.stack([row[1], -row[1]]) / 2}
    assert all(norm.norms[k].norm(t) == pytest.approx(1) for k, t in w.items())
    hessian = Hessian(lambda: loss(w, torch.tensor([0])), {k: t.requires_grad_() for k, t in w.items()})
    bound, shares = loss_smoothness(norm), (1 / 4, 1 / 4, 1 / 2)
    alpha = 2 * sum(a * b for a, b in itertools.combinations(shares, 2)) / scale  # of three maps in a row, by hand
    assert bound is not None and bound == pytest.approx(2 * alpha + 1)
    found = modular_sharpness(hessian, norm, generator=generator()).value
    print(f"{found:.4f} of {bound:.4f}", end=" ")
    assert found + LOCAL >= 1 and found <= bound + ROUNDING


def test_the_bound_is_the_trees_times_sigma_plus_tau_and_none_where_a_bond_declares_nothing():
    norm = chain(1.0)[0]
    constants = norm.smoothness()
    assert constants is not None and constants[0] > 0
    assert loss_smoothness(norm, sigma=3.0, tau=0.25) == pytest.approx(3 * constants[0] + 0.25)
    assert loss_smoothness(ModularNorm.of(atom("w", RMSToLinf()))) == 1  # linear in its weight: cross-entropy's own
    assert loss_smoothness(ModularNorm.of(atom("b", EXACT) @ bond("relu²", typical=True) @ atom("a", EXACT))) is None
    assert loss_smoothness(ModularNorm({}, {})) is None
