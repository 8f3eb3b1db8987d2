"""mlo: multi-level optimization on PyTorch.

Declare each level as a `Problem` whose loss names the problems it reads. `MultilevelOptimizer`
builds the dependency graph and computes each level's total gradient, including how the levels below
respond, with a hypergradient engine that you pick by name.

The names below are public. So are the modules `mlo.distributed` and `mlo.randomness` (for losses),
`mlo.errors`, `mlo.hypergradient` (for engines of your own), `mlo.testing` (their contract),
`mlo.betty`, and `mlo.compat.betty` (for programs written for Betty).
"""

from mlo import constraints
from mlo.averages import Average, Ema, TailAverage
from mlo.checkpoint import CheckpointStore, load_checkpoint, save_checkpoint
from mlo.compare import EngineComparison, EngineRow, compare_engines
from mlo.distributed import DataParallel
from mlo.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigurationError,
    EngineError,
    GraphError,
    NonFiniteError,
    ProblemError,
    SolveWarning,
)
from mlo.estimators import Estimator, Saga, Spider, Storm
from mlo.graph import DependencyGraph
from mlo.hypergradient import (
    Autograd,
    ConjugateGradient,
    Direct,
    Engine,
    FiniteDifference,
    FirstOrder,
    Gmres,
    Identity,
    Minres,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    OneStep,
    OuterProduct,
    Penalty,
    Sid,
    Soba,
    Unroll,
    ZerothOrder,
    available_engines,
    darts,
    engine_from,
    register_engine,
)
from mlo.implicit import implicit_solution
from mlo.indexed_batches import IndexedBatch, IndexedBatches
from mlo.once import once
from mlo.optimizer import MultilevelOptimizer
from mlo.problem import Problem
from mlo.records import GradientReport, Record, SolveReport
from mlo.update import Update

__version__ = "0.1.0"

__all__ = [
    "Autograd",
    "Average",
    "CheckpointError",
    "CheckpointStore",
    "CheckpointWarning",
    "ConfigurationError",
    "ConjugateGradient",
    "DataParallel",
    "DependencyGraph",
    "Direct",
    "Ema",
    "Engine",
    "EngineComparison",
    "EngineError",
    "EngineRow",
    "Estimator",
    "FiniteDifference",
    "FirstOrder",
    "Gmres",
    "GradientReport",
    "GraphError",
    "Identity",
    "IndexedBatch",
    "IndexedBatches",
    "Minres",
    "MultilevelOptimizer",
    "Neumann",
    "NonFiniteError",
    "NormalConjugateGradient",
    "Nystrom",
    "OneStep",
    "OuterProduct",
    "Penalty",
    "Problem",
    "ProblemError",
    "Record",
    "Saga",
    "Sid",
    "Soba",
    "SolveReport",
    "SolveWarning",
    "Spider",
    "Storm",
    "TailAverage",
    "Unroll",
    "Update",
    "ZerothOrder",
    "available_engines",
    "compare_engines",
    "constraints",
    "darts",
    "engine_from",
    "implicit_solution",
    "load_checkpoint",
    "once",
    "register_engine",
    "save_checkpoint",
]


def __dir__() -> list[str]:
    """The public names, which is what completion shows."""
    return [*__all__, "__version__"]
