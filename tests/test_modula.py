"""optim/modular.py and optim/norms.py against `modula` 0.0.0.0.0.2 on PyPI, the last torch version of the package by
the modular norm's authors.

Its atoms carry a scale in the forward pass, so that what acts is scale · weight. Each call of its normalize is one
step of a power iteration that starts where the last call ended: on fresh copies of one update, calls converge.
Weights come in the same order, that of the forward pass.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modula import abstract, compound
from modula import atom as atoms
from modula import bond as bonds
from modula.vector import Vector
from optim import ModularNorm
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import L1ToRMS, RMSToRMS
from optim.views import ConvRMSToRMS

CLOSE = 1e-5  # in float64 2e-12 is measured at worst
SETTLED = 1e-13  # two calls of Modula's normalize differ by no more
LR = 0.3
Theirs = Any  # a module of Modula's, whose types are not declared
NETWORKS: Theirs = compound


def leaves(module: Theirs) -> list[Theirs]:
    """Its atoms in the order of its weights."""
    return (
        [module]
        if module.length and not module.children
        else [leaf for child in module.children for leaf in leaves(child)]
    )


def normalized(module: Theirs, update: list[torch.Tensor]) -> list[torch.Tensor]:
    """LR · its normalized update as it acts: scale · weight."""
    last = None
    for _ in range(3000):
        w = [u.clone() for u in update]
        module.normalize(Vector(w), target_norm=LR)
        if last and all(torch.allclose(a, b, rtol=SETTLED, atol=0) for a, b in zip(w, last, strict=True)):
            return [leaf.scale * t for leaf, t in zip(leaves(module), w, strict=True)]
        last = w
    raise AssertionError("Modula's power iteration has not converged")


def declared(label: str, module: Theirs) -> Module:
    """Our bond of a sensitivity that Modula's code declares."""
    return bond(label, sensitivity=module.sensitivity)


LAYER_NORM, IDENTITY = declared("layer norm", bonds.LayerNorm()), declared("identity", bonds.Identity())


def linear(name: str) -> Module:
    return atom(name, RMSToRMS())


def gpt(n_layer: int, blocks_mass: float) -> Module:
    """compound.GPT, line by line."""
    initial = (
        0.5 * atom("wte", L1ToRMS()) + 0.5 * (atom("wpe", L1ToRMS()) @ declared("enumerate", bonds.Enumerate()))
    ).tare(1)
    split, merge = declared("split", bonds.AddHeads(1)), declared("merge", bonds.RemoveHeads())
    qkv = concat(*(split @ linear(f"{{}}.{name}") for name in "qkv"))
    inner = declared("attention", bonds.FunctionalAttention(causal=True)) @ (1 / 3 * IDENTITY)
    attention = linear("{}.out") @ merge @ inner @ qkv @ LAYER_NORM
    mlp = linear("{}.down") @ declared("scaled gelu", bonds.ScaledGELU()) @ linear("{}.up") @ LAYER_NORM
    blocks = ((residual(mlp, 2 * n_layer) @ residual(attention, 2 * n_layer)) ** n_layer).tare(blocks_mass)
    return (linear("head") @ LAYER_NORM) @ blocks @ initial


def resnet(
    initial: Module, layer: Module, final: Module, num_blocks: int, block_depth: int, blocks_mass: float
) -> Module:
    """compound.ResMLP and compound.ResCNN: the same bonds around other atoms."""
    residue = (
        declared("mean subtract", bonds.MeanSubtract())
        @ declared("abs", bonds.Abs())
        @ layer
        @ declared("rms", bonds.RMSDivide())
    )
    return final @ (residual(residue**block_depth, num_blocks) ** num_blocks).tare(blocks_mass) @ initial


def resmlp(num_blocks: int, block_depth: int) -> Module:
    initial = linear("initial") @ declared("flatten", bonds.Flatten())
    return resnet(initial, linear("{}.{}"), linear("final"), num_blocks, block_depth, 1)


def rescnn(num_blocks: int, block_depth: int, blocks_mass: float) -> Module:
    final = linear("final") @ declared("flatten", bonds.Flatten()) @ declared("average", bonds.AvgPool())
    return resnet(
        atom("initial", ConvRMSToRMS()), atom("{}.{}", ConvRMSToRMS()), final, num_blocks, block_depth, blocks_mass
    )


GPT: dict[str, Any] = {"vocab_size": 11, "context": 7, "d_embed": 12}
PAIRS: dict[str, tuple[Theirs, Any]] = {
    "GPT, 1 layer of 1 head": (
        NETWORKS.GPT(num_heads=1, d_query=12, d_value=12, num_blocks=1, blocks_mass=5, **GPT),
        gpt(1, 5),
    ),
    "GPT, 3 layers of 2 heads": (
        NETWORKS.GPT(num_heads=2, d_query=6, d_value=6, num_blocks=3, blocks_mass=5, **GPT),
        gpt(3, 5),
    ),
    "GPT, mass 0.7, uneven heads": (
        NETWORKS.GPT(num_heads=3, d_query=2, d_value=5, num_blocks=2, blocks_mass=0.7, **GPT),
        gpt(2, 0.7),
    ),
    "GPT, mass 40": (NETWORKS.GPT(num_heads=4, d_query=3, d_value=3, num_blocks=4, blocks_mass=40, **GPT), gpt(4, 40)),
    "ResMLP": (NETWORKS.ResMLP(width=8, num_blocks=3, block_depth=2, input_dim=5, output_dim=4), resmlp(3, 2)),
    "ResCNN": (NETWORKS.ResCNN(width=6, num_blocks=2, block_depth=3, input_dim=3, output_dim=4), rescnn(2, 3, 20)),
    "ResCNN, mass 0.5": (
        NETWORKS.ResCNN(width=6, num_blocks=4, block_depth=1, input_dim=3, output_dim=4, blocks_mass=0.5),
        rescnn(4, 1, 0.5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_normalized_updates_are_modulas_tensor_by_tensor(name: str):
    theirs, tree = PAIRS[name]
    torch.manual_seed(0)
    weights = theirs.initialize("cpu", dtype=torch.float64)
    ours = ModularNorm.of(tree)
    update = [torch.randn_like(w, requires_grad=False) for w in weights]
    found = dict(zip(ours.norms, normalized(theirs, update), strict=True))
    for key, tensor in found.items():
        assert ours.norms[key].norm(tensor).item() == pytest.approx(LR * ours.radii[key], rel=CLOSE)
    assert ours.norm(found).item() == pytest.approx(LR, rel=CLOSE), "the whole has modular norm LR"
    mine = ours.normalize(dict(zip(ours.norms, update, strict=True)), by_block=True)
    for key, tensor in found.items():
        assert torch.allclose(LR * mine[key], tensor, rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_masses_and_sensitivities_are_modulas(name: str):
    theirs, tree = PAIRS[name]
    assert list(ModularNorm.of(tree).masses.values()) == pytest.approx(
        [leaf.mass for leaf in leaves(theirs)], rel=1e-12
    )
    first, (blocks, final) = theirs.children[0], theirs.children[1].children
    pairs = [(theirs, tree), (first, tree.inner), (blocks, tree.outer.inner), (final, tree.outer.outer)]
    for a, b in pairs:
        assert (b.mass, b.sensitivity) == pytest.approx((a.mass, a.sensitivity), rel=1e-12)


def test_initial_weights_have_norm_one_in_both():
    """Modula's orthogonal start, times its scale, lies on our unit spheres; so does ours."""
    for theirs, tree in PAIRS.values():
        torch.manual_seed(1)
        for leaf, w, norm in zip(
            leaves(theirs), theirs.initialize("cpu"), ModularNorm.of(tree).norms.values(), strict=True
        ):
            assert norm.norm(leaf.scale * w.detach()).item() == pytest.approx(1, rel=CLOSE)
            assert norm.norm(norm.init(w.shape, torch.Generator().manual_seed(0))).item() == pytest.approx(1, rel=CLOSE)


# Random trees of scalar weights, on which Modula's power iteration is exact at once: (kind, arguments …).
FACTORS = st.sampled_from([0.25, 1 / 3, 0.8, 1.0, 2.0, -3.0])
TREES = st.recursive(
    st.tuples(st.just("atom"), st.sampled_from([0, 0.3, 1, 5])) | st.tuples(st.just("bond"), FACTORS.map(abs)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["after", "sum", "beside"]), inner, inner),
        st.tuples(st.sampled_from(["times", "tare"]), FACTORS, inner),
        st.tuples(st.just("power"), st.integers(1, 3), inner),
    ),
    max_leaves=8,
)


def twins(kind: str, *arguments) -> tuple[Theirs, Module]:
    """The same tree in Modula and here."""
    if kind == "atom":
        return atoms.Linear(1, 1, mass=arguments[0]), atom("weight", RMSToRMS(), mass=arguments[0])
    if kind == "bond":
        theirs: Theirs = bonds.Identity()
        theirs.sensitivity = arguments[0]
        return theirs, bond("bond", sensitivity=arguments[0])
    if kind in ("after", "sum", "beside"):
        (a, x), (b, y) = (twins(*child) for child in arguments)
        return {"after": (a @ b, x @ y), "sum": (a + b, x + y), "beside": (abstract.TupleModule((a, b)), concat(x, y))}[
            kind
        ]
    number, (a, x) = arguments[0], twins(*arguments[1])
    if kind == "power":
        return a**number, x**number
    if kind == "times":
        return number * a, number * x
    if a.mass:
        a.tare(absolute=abs(number))
        x = x.tare(abs(number))
    return a, x


@given(TREES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_trees_compose_as_modulas_do(recipe: tuple):
    theirs, ours = twins(*recipe)
    assert (ours.mass, ours.sensitivity) == pytest.approx((theirs.mass, theirs.sensitivity), rel=1e-12)
    w = Vector([t.detach() for t in theirs.initialize("cpu", dtype=torch.float64)])
    theirs.normalize(w, target_norm=LR)
    found = list(ours.radii(LR))
    assert [radius for _, radius in found] == pytest.approx([abs(t.item()) for t in w], rel=1e-12, abs=0)
    assert [leaf.mass for leaf, _ in found] == pytest.approx([leaf.mass for leaf in leaves(theirs)], rel=1e-12)
