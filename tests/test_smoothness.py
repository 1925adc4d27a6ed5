"""(α, β, γ) of optim/modular.py's trees against second derivatives of real networks. Oracle: an adversary that picks directions, weights and inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp
from torch.nn.functional import one_hot

from optim import Atom, L1ToRMS, ModularNorm, Module, Norm, Polar, RMSToLinf, RMSToRMS, atom, modular, residual
from optim.modular import Bond, Composite, Concat, Power
from optim.norms import Blocks

DRAWS, RESTARTS, STEPS = 100, 2, 25  # networks per architecture; of the adversary, per network
WIDTH, TOKENS, MANY = 4, 2, 20  # attention attains its γ where one token of 20 stands against the others
ROUNDING = 1e-9
TIGHT = 0.98  # the fraction of a constant that the adversary finds where the constant is tight
CONSTANTS = "αβγ"

LINEAR = RMSToRMS(Polar("exact"))
State = dict[str, Tensor]  # weights by name and the input "x"; the first dimension counts networks


# -- networks ------------------------------------------------------------------------------------------------------------------------


def attend(qkv: tuple[Tensor, Tensor, Tensor], heads: int = 1, causal: bool = False) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in qkv)
    scores = q @ k.mT / q.shape[-1]
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


BONDS: dict[str, Callable] = {
    "identity": lambda x: x,
    "add": sum,
    "split": lambda x: x.chunk(3, -2),
    "tanh": torch.tanh,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "attention": attend,
    "causal attention": lambda x: attend(x, causal=True),
    "attention of 2 heads": lambda x: attend(x, heads=2),
}


def forward(tree: Module, w: State, x):
    """The network that the tree describes."""
    if isinstance(tree, Composite):
        return forward(tree.outer, w, forward(tree.inner, w, x))
    if isinstance(tree, Concat):
        return tuple(forward(child, w, x) for child in tree.children)
    if isinstance(tree, Power):
        for i in range(tree.times):
            x = forward(tree.block.mapped(lambda leaf, i=i: leaf.numbered(i)), w, x)
        return x
    if isinstance(tree, Atom):
        if not tree.sensitivity:
            return w[tree.name]
        return x @ (w[tree.name] if isinstance(tree.norm, L1ToRMS) else w[tree.name].mT)
    assert isinstance(tree, Bond)
    return tree.sensitivity * x if tree.label.startswith("× ") else BONDS[tree.label](x)


def linear(name: str, mass: float = 1.0) -> Module:
    return atom(name, LINEAR, mass=mass)


def table(name: str, mass: float = 1.0) -> Module:
    """A bias, one row a token."""
    return atom(name, L1ToRMS(), mass=mass, sensitivity=0)


def identity() -> Module:
    return modular.bond("identity", sharpness=0)


def elementwise(label: str, second: float, sensitivity: float = 1.0) -> Module:
    """second: max |φ''|. In RMS, γ = max |φ''| √width: two directions √width · e_i have RMS 1, and φ''(x_i) · width · e_i has RMS |φ''| √width."""
    return modular.bond(label, sensitivity=sensitivity, sharpness=second * WIDTH**0.5)


def tanh() -> Module:
    return elementwise("tanh", 4 / 3**1.5)


def gelu() -> Module:
    return elementwise("gelu", (2 / math.pi) ** 0.5, 1.1289)  # the steepest point is √2, the most curved 0


def attention(label: str = "attention", heads: int = 1) -> Module:
    """On queries, keys and values whose norm is the maximum over heads; merged, the heads' outputs have no larger RMS than that."""
    qkv = modular.concat(*(atom("{}." + n, Blocks(LINEAR, heads)) for n in "qkv"))
    return linear("{}.out") @ (1 / 3 * replace(modular.attention(), label=label)) @ qkv


def mlp(activation: Module) -> Module:
    return linear("{}.down") @ activation @ linear("{}.up")


class L1(Norm):
    """max over rows of ‖row‖₁: the rows choose among an embedding's."""

    def norm(self, W: Tensor) -> Tensor:
        return W.abs().sum(-1).amax(-1)

    def dualize(self, G: Tensor) -> Tensor:
        return G.sign() * one_hot(G.abs().argmax(-1), G.shape[-1])


class Triple(L1ToRMS):
    """Three matrices on top of each other, with the sum norm of a tuple."""

    def norm(self, W: Tensor) -> Tensor:
        return super().norm(W.unflatten(-2, (3, -1))).sum(-1)

    def dualize(self, G: Tensor) -> Tensor:
        parts = G.unflatten(-2, (3, -1))
        return (super().dualize(parts) * one_hot(self.dual_norm(parts).argmax(-1), 3)[..., None, None]).flatten(-3, -2)


def rms(y: Tensor) -> Tensor:
    """(networks, tokens, width) → (networks,): the maximum over tokens."""
    return (torch.linalg.vector_norm(y, dim=-1) / y.shape[-1] ** 0.5).amax(-1)


def linf(y: Tensor) -> Tensor:
    return y.abs().amax((-2, -1))


@dataclass(frozen=True)
class Architecture:
    """tree: built anew at every call. tight: the constants that the adversary attains. shapes: of weights (by the name's last part) and of "x".

    inputs, size: the norms of inputs and of outputs.
    """

    tree: Callable[[], Module]
    tight: str = ""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: Norm = field(default=L1ToRMS())
    size: Callable[[Tensor], Tensor] = rms

    def shape(self, name: str) -> tuple[int, int]:
        return self.shapes.get(name.rpartition(".")[2], (1, WIDTH) if name == "x" else (WIDTH, WIDTH))


TEXT = {"wte": (5, WIDTH), "x": (TOKENS, 5), "head": (6, WIDTH)}  # vocabularies of 5 and 6
HEAD, WTE = atom("head", RMSToLinf()), atom("wte", L1ToRMS())

ARCHITECTURES: dict[str, Architecture] = {
    "two maps": Architecture(lambda: linear("b") @ linear("a"), "αβ", {"a": (5, 3), "b": (2, 5), "x": (1, 3)}),
    "three maps, first b a": Architecture(lambda: linear("c", 2) @ (linear("b") @ linear("a", 3)), "αβ"),
    "three maps, first c b": Architecture(lambda: linear("c", 2) @ linear("b") @ linear("a", 3), "αβ"),
    "half of four maps": Architecture(lambda: 0.5 * linear("d") @ linear("c", 3) @ (linear("b", 2) @ linear("a")), "αβ"),
    "embedding, map and head": Architecture(lambda: HEAD @ linear("a", 2) @ WTE, "αβ", TEXT, L1(), linf),
    "tanh of a doubled map": Architecture(lambda: tanh() @ (2 * linear("a")), "αγ"),  # tanh's constants hold beyond the unit ball
    "tanh of input and bias": Architecture(lambda: tanh() @ (0.5 * identity() + 0.5 * table("b")), "αβγ", {"b": (1, WIDTH)}),
    "tanh MLP": Architecture(lambda: mlp(tanh()), "γ"),
    "gelu MLP": Architecture(lambda: mlp(gelu()), "γ", {"0.up": (WIDTH, 3), "down": (2, WIDTH), "up": (WIDTH, 3), "x": (1, 3)}),
    "sum of chains": Architecture(lambda: 0.5 * (linear("b", 2) @ linear("a")) + 0.5 * (linear("d") @ linear("c", 3)), "αβ"),
    "sum of tanh MLPs": Architecture(lambda: 0.5 * (linear("b") @ tanh()) + 0.5 * (linear("d", 2) @ tanh()), "γ"),
    "residual maps": Architecture(lambda: residual(mlp(identity()), 2) ** 2, "αβ"),
    "residual tanh MLPs": Architecture(lambda: residual(mlp(tanh()), 2) ** 2),
    "residual gelu MLPs": Architecture(lambda: residual(mlp(gelu()), 2) ** 2),
    "attention of an input triple": Architecture(lambda: modular.attention() @ modular.bond("split", sharpness=0), "γ", {"x": (3 * MANY, 2)}, Triple()),
    "attention to input keys": Architecture(
        lambda: modular.attention() @ modular.concat(table("q"), identity(), table("v", 0)), "β", dict.fromkeys("qvx", (MANY, 2))
    ),
    "causal attention": Architecture(lambda: attention("causal attention"), "", {"x": (3, WIDTH)}),
    "attention of 2 heads": Architecture(lambda: attention("attention of 2 heads", 2), "", {"x": (3, WIDTH)}),
    "transformer": Architecture(lambda: HEAD @ residual(mlp(tanh()), 2) @ residual(attention("causal attention"), 2) @ WTE, "", TEXT, L1(), linf),
}


# -- the adversary -------------------------------------------------------------------------------------------------------------------


def adversary(apply: Callable[[State], Tensor], size: Callable, norms: dict[str, Norm], p: State, reach_u: State, reach_v: State) -> tuple[Tensor, State]:
    """The largest size(∂² apply(p)[u, v]) found, (networks,), and its p. ‖u_k‖ <= reach_u[k], ‖v_k‖ <= reach_v[k], (networks,); ‖p_k‖ <= 1.

    The size is convex in u and in v: the dual maximiser of its gradient never lowers it. p goes towards the dual maximiser where that is a gain.
    """

    def curvature(p: State, u: State, v: State) -> tuple[Tensor, Tensor]:
        found = size(jvp(lambda p: jvp(apply, (p,), (u,))[1], (p,), (v,))[1])
        return found.sum(), found

    def scaled(scale: Tensor, tensor: Tensor) -> Tensor:
        return scale.reshape(-1, *(1,) * (tensor.ndim - 1)) * tensor

    def extreme(grads: State, reach: State) -> State:
        return {k: scaled(reach[k], norms[k].dualize(g)) for k, g in grads.items()}

    step = torch.full((len(p["x"]),), 0.5, dtype=torch.float64)
    whole = {k: torch.ones_like(step) for k in p}
    u, v = (extreme({k: torch.randn_like(t) for k, t in p.items()}, reach) for reach in (reach_u, reach_v))
    for _ in range(STEPS):
        u = extreme(grad(curvature, 1, has_aux=True)(p, u, v)[0], reach_u)
        v = extreme(grad(curvature, 2, has_aux=True)(p, u, v)[0], reach_v)
        uphill, (_, found) = grad_and_value(curvature, has_aux=True)(p, u, v)
        p_next = {k: p[k] + scaled(step, t - p[k]) for k, t in extreme(uphill, whole).items()}  # in the unit ball, by convexity
        gain = curvature(p_next, u, v)[1] > found
        p = {k: torch.where(gain.reshape(-1, *(1,) * (t.ndim - 1)), p_next[k], t) for k, t in p.items()}
        step = torch.where(gain, (2 * step).clamp(max=1), step / 2)
    return curvature(p, u, v)[1], p


def draws(norms: dict[str, Norm], shape: Callable[[str], tuple[int, ...]], copies: int) -> State:
    """Networks whose weights and inputs have norm 1, half of them, or anything below."""
    p = {k: n.dualize(torch.randn(DRAWS, *shape(k), dtype=torch.float64)) for k, n in norms.items()}
    return {k: (t * (2 * torch.rand(DRAWS, 1, 1, dtype=torch.float64)).clamp(max=1)).repeat(copies, 1, 1) for k, t in p.items()}


@lru_cache
def worst(name: str) -> tuple[float, float, float]:
    """The largest second derivatives in (w, w), (w, x), (x, x) that the adversary finds on an architecture's networks."""
    torch.manual_seed(0)
    a = ARCHITECTURES[name]
    tree = a.tree()
    modular_norm = ModularNorm.of(tree)
    norms, radii = modular_norm.norms | {"x": a.inputs}, modular_norm.radii | {"x": 1.0}
    w_and_x = ((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1))  # what u moves, and v, in the thirds of the batch: one for each constant
    reach_u, reach_v = ({k: r * torch.tensor(x if k == "x" else w).double().repeat_interleave(DRAWS * RESTARTS) for k, r in radii.items()} for w, x in w_and_x)
    found, p = adversary(lambda p: forward(tree, p, p["x"]), a.size, norms, draws(norms, a.shape, 3 * RESTARTS), reach_u, reach_v)
    assert all(norms[k].norm(t).max() <= 1 + ROUNDING for k, t in p.items()) and a.size(forward(tree, p, p["x"])).max() <= 1 + ROUNDING
    return tuple(found.reshape(3, -1).amax(1).tolist())


def ratios(name: str) -> dict[str, float]:
    """By constant; 0 where both are."""
    bounds = ARCHITECTURES[name].tree().sharpness
    return {c: found / bound if bound else found for c, found, bound in zip(CONSTANTS, worst(name), bounds, strict=True)}
