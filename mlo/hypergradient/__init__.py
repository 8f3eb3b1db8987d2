"""Hypergradient engines: how the derivative of a lower problem's solution is computed."""

from mlo.hypergradient.cg import ConjugateGradient
from mlo.hypergradient.direct import Direct
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.gmres import Gmres
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.iterative import FlatOperator, IterationResult, IterativeEngine
from mlo.hypergradient.minres import Minres
from mlo.hypergradient.neumann import Neumann
from mlo.hypergradient.normal_cg import NormalConjugateGradient
from mlo.hypergradient.nystrom import Nystrom
from mlo.hypergradient.one_step import OneStep, darts
from mlo.hypergradient.options import count, number, number_or_auto
from mlo.hypergradient.outer_product import OuterProduct
from mlo.hypergradient.penalty import Penalty
from mlo.hypergradient.products import (
    Autograd,
    Engine,
    LinearSystem,
    Products,
    Solve,
    relative_residual,
)
from mlo.hypergradient.registry import (
    EngineChoice,
    available_engines,
    engine_from,
    register_engine,
)
from mlo.hypergradient.sid import Sid
from mlo.hypergradient.soba import Soba
from mlo.hypergradient.unroll import Unroll
from mlo.hypergradient.zeroth_order import ZerothOrder
from mlo.response import Cotangent, Pullback, PullbackEngine
from mlo.solution import AbstractEngine, StepEngine

__all__ = [
    "AbstractEngine",
    "Autograd",
    "ConjugateGradient",
    "Cotangent",
    "Direct",
    "Engine",
    "EngineChoice",
    "FiniteDifference",
    "FirstOrder",
    "FlatOperator",
    "Gmres",
    "Identity",
    "IterationResult",
    "IterativeEngine",
    "LinearSystem",
    "Minres",
    "Neumann",
    "NormalConjugateGradient",
    "Nystrom",
    "OneStep",
    "OuterProduct",
    "Penalty",
    "Products",
    "Pullback",
    "PullbackEngine",
    "Sid",
    "Soba",
    "Solve",
    "StepEngine",
    "Unroll",
    "ZerothOrder",
    "available_engines",
    "count",
    "darts",
    "engine_from",
    "number",
    "number_or_auto",
    "register_engine",
    "relative_residual",
]
