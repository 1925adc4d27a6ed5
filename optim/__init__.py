"""The dualized optimizer: norms, their composition into the modular norm of a network, and steepest descent in it."""

from .dualized import Dualized
from .metrize import CoverageError, metrize
from .modular import Atom, Bond, ModularNorm, Module, NonFiniteError, atom, bond, concat, residual
from .norms import NORMS, Frobenius, L1ToLinf, L1ToRMS, Norm, RMSToLinf, RMSToRMS, VectorRMS, register_norm
from .polar import Polar

__all__ = [
    "NORMS",
    "Atom",
    "Bond",
    "CoverageError",
    "Dualized",
    "Frobenius",
    "L1ToLinf",
    "L1ToRMS",
    "ModularNorm",
    "Module",
    "NonFiniteError",
    "Norm",
    "Polar",
    "RMSToLinf",
    "RMSToRMS",
    "VectorRMS",
    "atom",
    "bond",
    "concat",
    "metrize",
    "register_norm",
    "residual",
]
