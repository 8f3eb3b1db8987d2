"""Hypergradient engines: how the derivative of a lower problem's solution is computed."""

from mlo.hypergradient.base import Cotangent, Engine, Solve, relative_residual
from mlo.hypergradient.cg import ConjugateGradient
from mlo.hypergradient.direct import Direct
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.gmres import Gmres
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.iterative import FlatOperator, IterativeEngine, Outcome
from mlo.hypergradient.minres import Minres
from mlo.hypergradient.neumann import Neumann
from mlo.hypergradient.nystrom import Nystrom
from mlo.hypergradient.one_step import OneStep, darts
from mlo.hypergradient.penalty import Penalty
from mlo.hypergradient.products import Autograd, FiniteDifference, LinearSystem, Products
from mlo.hypergradient.registry import available_engines, engine_from, register_engine
from mlo.hypergradient.soba import Soba
from mlo.hypergradient.unroll import Unroll

__all__ = [
    "Autograd",
    "ConjugateGradient",
    "Cotangent",
    "Direct",
    "Engine",
    "FiniteDifference",
    "FirstOrder",
    "FlatOperator",
    "Gmres",
    "Identity",
    "IterativeEngine",
    "LinearSystem",
    "Minres",
    "Neumann",
    "Nystrom",
    "OneStep",
    "Outcome",
    "Penalty",
    "Products",
    "Soba",
    "Solve",
    "Unroll",
    "available_engines",
    "darts",
    "engine_from",
    "register_engine",
    "relative_residual",
]
