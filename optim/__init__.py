"""The dualized optimizer: norms, their composition into the modular norm of a network, and steepest
descent in it."""

from .baselines import BASELINES, coordinates, register_baseline
from .curvature import Hessian, along, eigenvalues, loss_smoothness, modular_sharpness
from .directions import DIRECTIONS, Direction, register_direction
from .dualized import Dualized
from .errors import CoverageError, NonFiniteError, PlacementError
from .metrize import Rule, metrize
from .modular import Atom, Bond, ModularNorm, Module, atom, attention, bond, concat, residual
from .normalized import Normalized
from .norms import (
    NORMS,
    Frobenius,
    L1ToLinf,
    L1ToRMS,
    MaxEntry,
    MeanToLinf,
    Norm,
    RMSToLinf,
    RMSToRMS,
    Spectral,
    VectorRMS,
    register_norm,
)
from .polar import Polar
from .schedules import EscapeVelocity
from .views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed

__all__ = [
    "BASELINES",
    "DIRECTIONS",
    "NORMS",
    "Atom",
    "Blocks",
    "Bond",
    "ConvRMSToRMS",
    "CoverageError",
    "Direction",
    "Dualized",
    "EscapeVelocity",
    "Experts",
    "Flattened",
    "Frobenius",
    "Hessian",
    "L1ToLinf",
    "L1ToRMS",
    "MaxEntry",
    "MeanToLinf",
    "ModularNorm",
    "Module",
    "NonFiniteError",
    "Norm",
    "Normalized",
    "PlacementError",
    "Polar",
    "RMSToLinf",
    "RMSToRMS",
    "Rule",
    "Spectral",
    "Transposed",
    "VectorRMS",
    "along",
    "atom",
    "attention",
    "bond",
    "concat",
    "coordinates",
    "eigenvalues",
    "loss_smoothness",
    "metrize",
    "modular_sharpness",
    "register_baseline",
    "register_direction",
    "register_norm",
    "residual",
]
