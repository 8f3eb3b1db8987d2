"""Betty's classes on `mlo`: a program for Betty 0.2.1 (`betty-ml`) runs with another import.

`from betty.engine import Engine` becomes `from mlo.compat.betty.engine import Engine`, and likewise
for `problems`, `configs` and `envs`. All names can be imported from here as well. What each public
name of Betty does here, and what differs, is in docs/migrating-from-betty.md.
"""

from mlo.compat.betty.configs import Config, EngineConfig
from mlo.compat.betty.early_stopping import EarlyStopping
from mlo.compat.betty.engine import Engine
from mlo.compat.betty.envs import Env
from mlo.compat.betty.problems import (
    HigherIterativeProblem,
    ImplicitProblem,
    IterativeProblem,
    MetaIterativeProblem,
    Problem,
)

__all__ = [
    "Config",
    "EarlyStopping",
    "Engine",
    "EngineConfig",
    "Env",
    "HigherIterativeProblem",
    "ImplicitProblem",
    "IterativeProblem",
    "MetaIterativeProblem",
    "Problem",
]
