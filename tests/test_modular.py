"""optim/modular.py.

Oracles: Modula's published composition (theory.md §2's check value), perturbation of real networks, and Hölder.
"""

import math

import pytest
import torch
from optim import ModularNorm, NonFiniteError
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import Frobenius, L1ToRMS, RMSToLinf, RMSToRMS
from optim.polar import Polar

LINEAR = RMSToRMS(Polar("exact"))


def linear(name: str, mass: float = 1.0) -> Module:
    return atom(name, LINEAR, mass=mass)


def radii(tree: Module) -> dict[str, float]:
    return ModularNorm.of(tree).radii


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_modulas_gpt_has_its_published_radii_at_every_depth(depth: int):
    embedding = ((0.5 * atom("wte", L1ToRMS())) + (0.5 * atom("wpe", L1ToRMS()))).tare(1)
    attention = linear("{}.out") @ (1 / 3 * bond("attention")) @ concat(linear("{}.q"), linear("{}.k"), linear("{}.v"))
    mlp = linear("{}.down") @ bond("scaled gelu") @ linear("{}.up")
    blocks = ((residual(mlp, 2 * depth) @ residual(attention, 2 * depth)) ** depth).tare(5)
    found = radii(linear("head") @ blocks @ embedding)
    expected = {"wte": 1 / 7, "wpe": 1 / 7, "head": 1 / 7}
    for i in range(depth):
        expected |= {f"{i}.{n}": 5 / 7 for n in "qkv"} | {f"{i}.{n}": 5 / 21 for n in ("out", "up", "down")}
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[k], expected[k], rel_tol=1e-12) for k in expected)


def test_composition_is_associative():
    a, b, c = linear("a", 1), 2.0 * linear("b", 3), 0.5 * linear("c", 2)
    left, right = radii((c @ b) @ a), radii(c @ (b @ a))
    assert left == pytest.approx(right, rel=1e-14)


def test_powers_number_the_innermost_first():
    tree = (linear("s.{}.b.{}") ** 2) ** 3
    assert set(radii(tree)) == {f"s.{i}.b.{j}" for i in range(3) for j in range(2)}


def test_typical_values_are_inherited_and_smooth_over_nothing_else():
    typical = bond("relu²", typical=True)
    for tree in (
        linear("a") @ typical,
        concat(linear("a"), typical),
        residual(typical, 4),
        (typical @ linear("{}")) ** 2,
        2.0 * typical,
    ):
        assert tree.typical
    assert not (linear("a") @ bond("identity")).typical


def test_mass_zero_gets_no_update_and_infinite_norm():
    norm = ModularNorm.of(linear("b") @ linear("a", mass=0))
    grads = {k: torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) for k in "ab"}
    assert norm.radii["a"] == 0 and not norm.dualize(grads)["a"].any()
    assert norm.norm(grads) == torch.inf
    assert norm.norm({"a": torch.zeros(3, 3)}) == 0


def test_tare_sets_the_total_mass_and_keeps_the_shares():
    tree = (linear("b", 3) @ linear("a", 1)).tare(8)
    assert tree.mass == 8
    found = ModularNorm.of(tree).masses
    assert (found["a"], found["b"]) == (2, 6)


@pytest.mark.parametrize("seed", range(5))
def test_the_modular_norm_bounds_the_change_of_a_networks_output(seed: int):
    """First order: ‖Δy‖ <= ‖Δw‖ for well-normed inputs and weights [MN, Prop. 3], on an actual residual network."""
    g = torch.Generator().manual_seed(seed)
    L, D = 3, 8
    block = linear("{}.down") @ bond("identity") @ linear("{}.up")
    tree = linear("head") @ residual(block, L) ** L @ linear("stem", 2)
    norm = ModularNorm.of(tree)
    w = {k: LINEAR.init((D, D), g).double() for k in norm.norms}

    def network(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = w["stem"] @ x
        for i in range(L):
            x = (1 - 1 / L) * x + (1 / L) * w[f"{i}.down"] @ w[f"{i}.up"] @ x
        return w["head"] @ x

    x = torch.randn(D, generator=g, dtype=torch.float64)
    x = x / x.square().mean().sqrt()
    grads = {k: torch.randn(D, D, generator=g, dtype=torch.float64) for k in w}
    step = norm.dualize(grads)
    assert abs(norm.norm(step) - 1) < 1e-10
    for direction in (step, norm.normalize(grads)):
        change = torch.func.jvp(lambda v: network(v, x), (w,), (direction,))[1]
        assert change.square().mean().sqrt() <= 1 + 1e-10


def test_aligned_linear_chains_attain_the_bound():
    norm = ModularNorm.of(linear("c", 2) @ linear("b", 1) @ linear("a", 3))
    x = torch.ones(4, dtype=torch.float64)
    w = {k: torch.eye(4, dtype=torch.float64) for k in "abc"}
    step = {k: norm.radii[k] * torch.eye(4, dtype=torch.float64) for k in "abc"}
    change = torch.func.jvp(lambda v: v["c"] @ v["b"] @ v["a"] @ x, (w,), (step,))[1]
    assert torch.allclose(change, x)


def test_dual_norm_is_attained_by_dualize_and_by_no_other_trial():
    norm = ModularNorm.of(atom("head", RMSToLinf()) @ linear("mid", 2) @ atom("embed", L1ToRMS(), mass=0.5))
    shapes = {"head": (6, 4), "mid": (4, 4), "embed": (6, 4)}
    g = torch.Generator().manual_seed(0)
    grads = {k: torch.randn(*s, generator=g, dtype=torch.float64) for k, s in shapes.items()}

    def inner(step: dict[str, torch.Tensor]) -> float:
        return sum((grads[k] * step[k]).sum().item() for k in grads)

    dual = norm.dual_norm(grads).item()
    assert inner(norm.dualize(grads)) == pytest.approx(dual, rel=1e-12)
    for _ in range(100):
        trial = {k: torch.randn(*s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
        assert inner({k: t / norm.norm(trial) for k, t in trial.items()}) <= dual


def test_normalize_gives_every_tensor_its_full_radius_and_leaves_zero():
    norm = ModularNorm.of(linear("b", 3) @ linear("a"))
    u = {"a": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(3, 3)}
    out = norm.normalize(u)
    assert LINEAR.norm(out["a"]).item() == pytest.approx(norm.radii["a"], rel=1e-5)
    assert not out["b"].any()


def test_nothing_has_norm_zero_and_tiny_updates_normalize():
    norm = ModularNorm.of(linear("a"))
    assert norm.norm({}) == norm.dual_norm({}) == 0
    out = norm.normalize({"a": torch.full((2, 2), 1e-40)})["a"]
    assert LINEAR.norm(out).item() == pytest.approx(norm.radii["a"], rel=1e-3)


def test_errors_name_the_tensor():
    norm = ModularNorm.of(linear("b") @ linear("a"))
    with pytest.raises(NonFiniteError, match="^b has entries that are not finite$"):
        norm.dualize({"a": torch.ones(2, 2), "b": torch.full((2, 2), torch.nan)})
    with pytest.raises(ValueError, match=r"^a tensor without a norm\n  got: 'c'\n  allowed: a, b\n  fix: "):
        norm.norm({"c": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"^names in a tree\n  got: 'a' twice\n  allowed: once\n  fix: "):
        ModularNorm.of(linear("a") @ linear("a"))
    with pytest.raises(ValueError, match="bond dead\\n  got: sensitivity 0"):
        bond("dead", sensitivity=0)
    with pytest.raises(ValueError, match="a module times 0"):
        _ = 0 * linear("a")
    with pytest.raises(ValueError, match="mass of a\\n  got: -1\\n  allowed: 0"):
        atom("a", Frobenius(), mass=-1)
    with pytest.raises(ValueError, match="a module.s power\\n  got: 0"):
        _ = linear("a") ** 0
    with pytest.raises(ValueError, match="tare\\n  got: mass 1 for a module of mass 0"):
        bond("x").tare(1)
