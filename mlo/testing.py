"""Problems with closed-form hypergradients, and the contract that every engine must fulfil.

A new engine is tested by inheriting the contract::

    class TestMyEngine(mlo.testing.EngineContract):
        def make_engine(self):
            return MyEngine()
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mlo.errors import EngineError
from mlo.hypergradient.registry import EngineChoice
from mlo.loss_results import call_deferred
from mlo.optimizer import MultilevelOptimizer
from mlo.problem import Problem, Tensors
from mlo.solution import AbstractEngine

__all__ = [
    "ClosedForm",
    "EngineContract",
    "Players",
    "Vector",
    "bilevel_quadratic",
    "bilinear_game",
    "chain_of_three",
    "check_gradient_changes_nothing",
    "diamond",
    "evaluated",
    "layered",
    "relative_error",
    "trilevel_quadratic",
]


Inverse = Callable[[Tensor, Tensor], Tensor]
"""(A [n, n], v [n]) → q [n], an engine's approximation of A⁻ᵀ v."""

LEARNING_RATE = 0.1
"""The learning rate of every problem here."""


class Vector(nn.Module):
    """A module that holds one vector, `.v`."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.v = nn.Parameter(value.detach().clone())


def evaluated(
    losses: Mapping[str, Any], metrics: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a game's losses as scalars, calling those that are functions, and its metrics."""
    scalars = dict(losses)
    return scalars, {**metrics, **call_deferred(scalars)}


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """A multi-level problem with its lower problems solved, and its exact total gradient.

    Attributes:
        problems: from the innermost to the outermost.
        upper: name of the problem whose gradient is known.
        exact: its total gradient dL/dx, shape [dim of x].
        jacobians: lower problem → A = dF/dθ of its stationarity map F, [n, n], the optimizer's
            weight decay included.
        mixed: lower problem → problem that it reads → dF/d(that), [n, dim of that].
        direct: problem → partial derivative of the upper loss in it, for those that the upper loss
            reads.
        losses: problem → its loss as a plain function of tensors, for oracles that unroll it.
    """

    problems: list[Problem]
    upper: str
    exact: Tensor
    jacobians: dict[str, Tensor] = field(default_factory=dict)
    mixed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    direct: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    def swept(self, inverse: Inverse) -> Tensor:
        """The total gradient with an engine's q in place of A⁻ᵀ v.

        Args:
            inverse: (A [n, n], v [n]) → q [n].
        """
        # From the outermost lower problem inwards: when its turn comes, a problem has received the
        # cotangents of all its readers.
        cotangents = dict(self.direct)
        for problem in reversed(self.problems[:-1]):
            v = cotangents.get(problem.name)
            if v is None:
                continue
            q = inverse(self.jacobians[problem.name], v)
            for read, block in self.mixed[problem.name].items():
                term = -block.T @ q
                cotangents[read] = cotangents[read] + term if read in cotangents else term
        return cotangents[self.upper]

    def optimizer(
        self, hypergradient: EngineChoice | dict[str, EngineChoice]
    ) -> MultilevelOptimizer:
        """Builds the optimizer with an engine."""
        return MultilevelOptimizer(self.problems, hypergradient)

    def value(self, name: str) -> Tensor:
        """The vector of a problem."""
        (problem,) = (problem for problem in self.problems if problem.name == name)
        return problem.parameters["v"].detach()


def relative_error(found: Tensor | Tensors, exact: Tensor | Tensors) -> float:
    """Returns ‖found − exact‖ / ‖exact‖ over all tensors together."""
    if isinstance(found, Tensor) or isinstance(exact, Tensor):
        assert isinstance(found, Tensor) and isinstance(exact, Tensor)
        found, exact = {"": found}, {"": exact}
    assert set(found) == set(exact), f"{sorted(found)} against {sorted(exact)}"
    difference = torch.nn.utils.get_total_norm([found[key] - exact[key] for key in exact])
    return float(difference / torch.nn.utils.get_total_norm(list(exact.values())))


class _Maker:
    """Seeded random vectors and matrices of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(self._dtype)

    def spd(self, dim: int, condition: float) -> Tensor:
        """A symmetric positive definite matrix with eigenvalues from 1 / condition to 1."""
        basis, _ = torch.linalg.qr(
            torch.randn(dim, dim, generator=self._generator, dtype=torch.float64)
        )
        eigenvalues = torch.logspace(0, -1, dim, base=condition, dtype=torch.float64)
        matrix: Tensor = (basis * eigenvalues) @ basis.T
        return matrix.to(self._dtype)


def _problem(
    name: str, value: Tensor, loss: Callable[..., Tensor], *, weight_decay: float = 0.0
) -> Problem:
    module = Vector(value)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    return Problem(name, module=module, optimizer=optimizer, loss=loss)


def bilevel_quadratic(
    *,
    dim: int = 6,
    condition: float = 10.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ClosedForm:
    """A lower problem `w` and an upper one `x`, both quadratic.

    `w` minimises ½ wᵀAw − wᵀBx, plus d/2 ‖w‖² by the optimizer's weight decay d. `x` minimises
    ½ ‖w* − t‖² + ½ ρ ‖x‖². So w* = (A + dI)⁻¹ B x, and the total gradient is
    ρx + Bᵀ (A + dI)⁻¹ (w* − t).
    """
    make = _Maker(seed, dtype)
    a, b, t, x = make.spd(dim, condition), make.normal(dim, 3), make.normal(dim), make.normal(3)
    rho = 0.1
    # The optimizer converges to w*, so its decay d belongs to the Jacobian: A + dI.
    damped = a + weight_decay * torch.eye(dim, dtype=dtype)
    w = torch.linalg.solve(damped, b @ x)

    def inner(w: Tensor, x: Tensor) -> Tensor:
        return 0.5 * w @ a @ w - w @ (b @ x)

    def outer(x: Tensor, w: Tensor) -> Tensor:
        return 0.5 * ((w - t) ** 2).sum() + 0.5 * rho * (x**2).sum()

    def w_loss(w: Vector, batch: None, *, x: Vector) -> Tensor:
        return inner(w.v, x.v)

    def x_loss(x: Vector, batch: None, *, w: Vector) -> Tensor:
        return outer(x.v, w.v)

    return ClosedForm(
        problems=[_problem("w", w, w_loss, weight_decay=weight_decay), _problem("x", x, x_loss)],
        upper="x",
        exact=rho * x + b.T @ torch.linalg.solve(damped, w - t),
        jacobians={"w": damped},
        mixed={"w": {"x": -b}},
        direct={"w": w - t, "x": rho * x},
        losses={"w": inner, "x": outer},
    )


def chain_of_three(
    *, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ClosedForm:
    """`w1` depends on `x`, `w2` on `w1`'s solution, and the loss of `x` on `w2`'s solution.

    w1* = A1⁻¹ B x, w2* = A2⁻¹ C w1*, L = ½ ‖w2* − t‖², so dL/dx = Bᵀ A1⁻¹ Cᵀ A2⁻¹ (w2* − t).
    """
    make = _Maker(seed, dtype)
    a1, a2 = make.spd(dim, 10.0), make.spd(dim, 10.0)
    b, c, t, x = make.normal(dim, 3), make.normal(dim, dim), make.normal(dim), make.normal(3)
    # From the innermost problem outwards: each solution is the right-hand side of the next.
    w1 = torch.linalg.solve(a1, b @ x)
    w2 = torch.linalg.solve(a2, c @ w1)

    def w1_loss(w1: Vector, batch: None, *, x: Vector) -> Tensor:
        return 0.5 * w1.v @ a1 @ w1.v - w1.v @ (b @ x.v)

    def w2_loss(w2: Vector, batch: None, *, w1: Vector) -> Tensor:
        return 0.5 * w2.v @ a2 @ w2.v - w2.v @ (c @ w1.v)

    def x_loss(x: Vector, batch: None, *, w2: Vector) -> Tensor:
        return 0.5 * ((w2.v - t) ** 2).sum()

    return ClosedForm(
        problems=[
            _problem("w1", w1, w1_loss),
            _problem("w2", w2, w2_loss),
            _problem("x", x, x_loss),
        ],
        upper="x",
        exact=b.T @ torch.linalg.solve(a1, c.T @ torch.linalg.solve(a2, w2 - t)),
        jacobians={"w1": a1, "w2": a2},
        mixed={"w1": {"x": -b}, "w2": {"w1": -c}},
        direct={"w2": w2 - t, "x": torch.zeros_like(x)},
    )


def diamond(*, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> ClosedForm:
    """The shape of LFM-CW: `arch` reaches `w2` directly, through `w1` and through `gan`.

    Each lower problem is a quadratic ½ wᵀAw − wᵀr, with r_w1 = B1 α, r_gan = Bg α and
    r_w2 = B2 α + C1 w1 + Cg gan. The upper loss is L = ½ ‖w2 − t‖² + ½ ρ ‖α‖².
    """
    make = _Maker(seed, dtype)
    a = {name: make.spd(dim, 10.0) for name in ("w1", "gan", "w2")}
    b = {name: make.normal(dim, 3) for name in ("w1", "gan", "w2")}
    c = {name: make.normal(dim, dim) for name in ("w1", "gan")}
    t, alpha, rho = make.normal(dim), make.normal(3), 0.1
    w1 = torch.linalg.solve(a["w1"], b["w1"] @ alpha)
    gan = torch.linalg.solve(a["gan"], b["gan"] @ alpha)
    w2 = torch.linalg.solve(a["w2"], b["w2"] @ alpha + c["w1"] @ w1 + c["gan"] @ gan)

    def w1_loss(w1: Vector, batch: None, *, arch: Vector) -> Tensor:
        return 0.5 * w1.v @ a["w1"] @ w1.v - w1.v @ (b["w1"] @ arch.v)

    def gan_loss(gan: Vector, batch: None, *, arch: Vector) -> Tensor:
        return 0.5 * gan.v @ a["gan"] @ gan.v - gan.v @ (b["gan"] @ arch.v)

    def w2_loss(w2: Vector, batch: None, *, arch: Vector, w1: Vector, gan: Vector) -> Tensor:
        return 0.5 * w2.v @ a["w2"] @ w2.v - w2.v @ (
            b["w2"] @ arch.v + c["w1"] @ w1.v + c["gan"] @ gan.v
        )

    def arch_loss(arch: Vector, batch: None, *, w2: Vector) -> Tensor:
        return 0.5 * ((w2.v - t) ** 2).sum() + 0.5 * rho * (arch.v**2).sum()

    # dL/dα = ρα + B2ᵀ q2 + B1ᵀ A1⁻¹ C1ᵀ q2 + Bgᵀ Ag⁻¹ Cgᵀ q2 with q2 = A2⁻¹ (w2 − t).
    q2 = torch.linalg.solve(a["w2"], w2 - t)
    exact = rho * alpha + b["w2"].T @ q2
    for name in ("w1", "gan"):
        exact = exact + b[name].T @ torch.linalg.solve(a[name], c[name].T @ q2)
    return ClosedForm(
        problems=[
            _problem("w1", w1, w1_loss),
            _problem("gan", gan, gan_loss),
            _problem("w2", w2, w2_loss),
            _problem("arch", alpha, arch_loss),
        ],
        upper="arch",
        exact=exact,
        jacobians=a,
        mixed={name: {"arch": -b[name]} for name in ("w1", "gan")}
        | {"w2": {"arch": -b["w2"], "w1": -c["w1"], "gan": -c["gan"]}},
        direct={"w2": w2 - t, "arch": rho * alpha},
    )


def layered(
    *, layers: int, dim: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ClosedForm:
    """Layers of two problems that each read both of the layer below: 2^layers paths from `x` to L.

    The problems are `p0_0, p0_1, p1_0, …`. The loss of each is ½ ‖w − r‖² · s, where r is a linear
    map of what it reads, so w* = r.
    """
    make = _Maker(seed, dtype)
    x = make.normal(dim)
    stiffness = 2.0
    values: dict[str, Tensor] = {"x": x}
    total: dict[str, Tensor] = {"x": torch.eye(dim, dtype=dtype)}
    mixed: dict[str, dict[str, Tensor]] = {}
    problems: list[Problem] = []
    for layer in range(layers):
        # Values, and total derivatives by x, follow from those of the layer below.
        below = ["x"] if layer == 0 else [f"p{layer - 1}_0", f"p{layer - 1}_1"]
        for index in range(2):
            name = f"p{layer}_{index}"
            maps = {read: make.normal(dim, dim) / (dim * len(below)) ** 0.5 for read in below}
            values[name] = torch.stack([maps[read] @ values[read] for read in below]).sum(0)
            total[name] = torch.stack([maps[read] @ total[read] for read in below]).sum(0)
            mixed[name] = {read: -stiffness * maps[read] for read in below}
            problems.append(_problem(name, values[name], _layer_loss(maps, stiffness)))
    top = [f"p{layers - 1}_0", f"p{layers - 1}_1"]
    t = make.normal(dim)

    def target(**reads: Vector) -> Tensor:
        return 0.5 * ((reads[top[0]].v + reads[top[1]].v - t) ** 2).sum()

    problems.append(_problem("x", x, _with_reads(lambda own, reads: target(**reads), top)))
    off = values[top[0]] + values[top[1]] - t
    return ClosedForm(
        problems=problems,
        upper="x",
        exact=(total[top[0]] + total[top[1]]).T @ off,
        jacobians={name: stiffness * torch.eye(dim, dtype=dtype) for name in mixed},
        mixed=mixed,
        direct={**dict.fromkeys(top, off), "x": torch.zeros_like(x)},
    )


def _layer_loss(maps: dict[str, Tensor], stiffness: float) -> Callable[..., Tensor]:
    def loss(own: Vector, reads: dict[str, Vector]) -> Tensor:
        residual = own.v - torch.stack(
            [maps[read] @ module.v for read, module in reads.items()]
        ).sum(0)
        return 0.5 * stiffness * (residual**2).sum()

    return _with_reads(loss, list(maps))


def _with_reads(
    loss: Callable[[Vector, dict[str, Vector]], Tensor], names: list[str]
) -> Callable[..., Tensor]:
    """Gives a loss of `(own, {name: module})` the signature `(own, batch, *, name, ...)`."""

    def called(own: Vector, batch: Any, **reads: Vector) -> Tensor:
        return loss(own, reads)

    # The names are known at run time only, and a problem reads its loss's signature.
    kinds = inspect.Parameter
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kinds("own", kinds.POSITIONAL_OR_KEYWORD), kinds("batch", kinds.POSITIONAL_OR_KEYWORD)]
        + [kinds(name, kinds.KEYWORD_ONLY) for name in names]
    )
    return called


def trilevel_quadratic(
    *, dim: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ClosedForm:
    """A true tri-level problem: the loss of `m` contains the response of `w` to `m` itself.

    w*(m, x) = A⁻¹ (B m + D x). `m` minimises ½ mᵀEm − mᵀF x + ½ ‖w* − t‖². With J = A⁻¹B and
    K = A⁻¹D its solution is

        (E + JᵀJ) m* = F x + Jᵀ (t − K x),   so   M = dm*/dx = (E + JᵀJ)⁻¹ (F − JᵀK).

    `x` minimises ½ ‖m* − s‖² + ½ ‖w* − r‖², with gradient Mᵀ (m* − s) + (J M + K)ᵀ (w* − r).
    """
    make = _Maker(seed, dtype)
    a, e = make.spd(dim, 5.0), make.spd(dim, 5.0)
    b, d, f = make.normal(dim, dim), make.normal(dim, 3), make.normal(dim, 3)
    t, s, r, x = make.normal(dim), make.normal(dim), make.normal(dim), make.normal(3)
    # In the docstring's letters: J, K, E + JᵀJ, m*, w* and M.
    j, k = torch.linalg.solve(a, b), torch.linalg.solve(a, d)
    total = e + j.T @ j
    m = torch.linalg.solve(total, f @ x + j.T @ (t - k @ x))
    w = j @ m + k @ x
    dm = torch.linalg.solve(total, f - j.T @ k)

    def w_loss(w: Vector, batch: None, *, m: Vector, x: Vector) -> Tensor:
        return 0.5 * w.v @ a @ w.v - w.v @ (b @ m.v + d @ x.v)

    def m_loss(m: Vector, batch: None, *, w: Vector, x: Vector) -> Tensor:
        return 0.5 * m.v @ e @ m.v - m.v @ (f @ x.v) + 0.5 * ((w.v - t) ** 2).sum()

    def x_loss(x: Vector, batch: None, *, m: Vector, w: Vector) -> Tensor:
        return 0.5 * ((m.v - s) ** 2).sum() + 0.5 * ((w.v - r) ** 2).sum()

    return ClosedForm(
        problems=[_problem("w", w, w_loss), _problem("m", m, m_loss), _problem("x", x, x_loss)],
        upper="x",
        exact=dm.T @ (m - s) + (j @ dm + k).T @ (w - r),
    )


class Players(nn.Module):
    """A module with two submodules, `.u` and `.v`, that each hold one vector."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.u = Vector(u)
        self.v = Vector(v)


def bilinear_game(
    *, dim: int = 3, coupling: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ClosedForm:
    """A lower game of two players, `u` and `v`, and an upper problem `x`.

    u minimises ½ uᵀPu + γ uᵀMv − uᵀBx, and v minimises ½ vᵀQv − γ uᵀMv − vᵀCx. The game's Jacobian
    J = [[P, γM], [−γMᵀ, Q]] is not symmetric, and J (u, v) = (B x, C x) at the equilibrium. `x`
    minimises ½ ‖u* − s‖² + ½ ‖v* − t‖², with gradient [B; C]ᵀ J⁻ᵀ (u* − s, v* − t).
    """
    make = _Maker(seed, dtype)
    p, q, m = make.spd(dim, 5.0), make.spd(dim, 5.0), coupling * make.normal(dim, dim)
    b, c, x, target = make.normal(dim, 2), make.normal(dim, 2), make.normal(2), make.normal(2 * dim)
    jacobian = torch.cat([torch.cat([p, m], 1), torch.cat([-m.T, q], 1)])
    both = torch.cat([b, c])
    equilibrium = torch.linalg.solve(jacobian, both @ x)
    module = Players(equilibrium[:dim], equilibrium[dim:])

    def game_loss(game: Players, batch: None, *, x: Vector) -> dict[str, Tensor]:
        u, v = game.u.v, game.v.v
        bilinear = u @ m @ v
        return {
            "u": 0.5 * u @ p @ u + bilinear - u @ (b @ x.v),
            "v": 0.5 * v @ q @ v - bilinear - v @ (c @ x.v),
        }

    def x_loss(x: Vector, batch: None, *, game: Players) -> Tensor:
        return 0.5 * ((torch.cat([game.u.v, game.v.v]) - target) ** 2).sum()

    game = Problem(
        "game",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        loss=game_loss,
        players={"u": "u", "v": "v"},
    )
    return ClosedForm(
        problems=[game, _problem("x", x, x_loss)],
        upper="x",
        exact=both.T @ torch.linalg.solve(jacobian.T, equilibrium - target),
        jacobians={"game": jacobian},
        mixed={"game": {"x": -both}},
        direct={"game": equilibrium - target, "x": torch.zeros_like(x)},
    )


def snapshot(optimizer: MultilevelOptimizer) -> dict[str, Any]:
    """Returns a copy of everything that `MultilevelOptimizer.gradient` must not change."""
    return optimizer.state_dict()


def identical(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(
            identical(a, b) for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)


def check_gradient_changes_nothing(optimizer: MultilevelOptimizer, name: str) -> None:
    """Asserts that `gradient` changes no state and repeats itself, before and after a round.

    Raises:
        AssertionError: if it does not.
    """
    for _ in range(2):
        before = snapshot(optimizer)
        first = optimizer.gradient(name)
        assert identical(before, snapshot(optimizer))
        assert identical(first, optimizer.gradient(name))
        optimizer.step()


GRAPHS: dict[str, Callable[..., ClosedForm]] = {
    "bilevel": bilevel_quadratic,
    "weight decay": functools.partial(bilevel_quadratic, weight_decay=0.3),
    "chain": chain_of_three,
    "diamond": diamond,
    "layered": functools.partial(layered, layers=4),
    "game": bilinear_game,
}
"""Graphs on which an engine is compared with its own formula (the tri-level one is separate)."""


class EngineContract:
    """The contract of every engine, on every graph, in both dtypes.

    Inherit it in a test class and define `make_engine`. On each graph an engine either equals its
    formula or is refused before the first step.

    Attributes:
        graphs: those on which the engine follows its formula. Leave one out only for an engine that
            is known to be wrong there.
        exact: whether `inverse` is the exact one, so that the engine must also be exact on the
            tri-level graph.
        tolerance: largest relative error in float64.
        tolerance_float32: largest relative error in float32.
    """

    graphs: ClassVar[Sequence[str]] = tuple(GRAPHS)
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-9
    tolerance_float32: ClassVar[float] = 1e-4

    def make_engine(self) -> AbstractEngine:
        """Returns the engine under test."""
        raise NotImplementedError

    def inverse(self, jacobian: Tensor, v: Tensor) -> Tensor:
        """The engine's formula for q ≈ A⁻ᵀ v before the first step: here the exact one.

        Args:
            jacobian: A, [n, n].
            v: the cotangent, [n].
        """
        solution: Tensor = torch.linalg.solve(jacobian.T, v)
        return solution

    def test_equals_its_formula_on_every_graph_in_both_dtypes(self) -> None:
        for dtype, tolerance in (
            (torch.float64, self.tolerance),
            (torch.float32, self.tolerance_float32),
        ):
            for name in self.graphs:
                # The reference is computed in float64, whatever the dtype under test.
                make = GRAPHS[name]
                reference = make().swept(self.inverse)
                problem = make(dtype=dtype)
                engine = self.make_engine()
                if name == "game" and engine.needs_symmetry:
                    self._check_refused(problem, engine)
                    continue
                found = problem.optimizer(engine).gradient(problem.upper)["v"].double()
                scale = max(float(reference.norm()), 1e-12)
                error = float((found - reference).norm()) / scale
                assert error < tolerance, (
                    f"{engine.label} on {name} in {dtype}: relative error {error:.1e}"
                )

    def test_is_exact_or_refused_on_the_trilevel_graph(self) -> None:
        engine = self.make_engine()
        if not engine.differentiable:
            self._check_refused(trilevel_quadratic(), engine)
        elif self.exact:
            problem = trilevel_quadratic()
            found = problem.optimizer(engine).gradient(problem.upper)["v"]
            assert relative_error(found, problem.exact) < self.tolerance

    @staticmethod
    def _check_refused(problem: ClosedForm, engine: AbstractEngine) -> None:
        message = ""
        try:
            problem.optimizer(engine)
        except EngineError as error:
            message = str(error)
        assert message, f"{engine.label} was not refused"
        assert "Use '" in message or "Give '" in message, (
            f"the error names no engine that can: {message}"
        )

    def test_solves_each_lower_problem_once(self) -> None:
        # `layered` has 2^10 paths: an engine that solved once per path would take a thousand times
        # as long. (A record holds one report per problem.)
        for problem in (diamond(), layered(layers=10)):
            record = problem.optimizer(self.make_engine()).step()
            lower = {p.name for p in problem.problems} - {problem.upper}
            assert set(record.solves) == lower

    def test_gradient_changes_nothing(self) -> None:
        check_gradient_changes_nothing(diamond().optimizer(self.make_engine()), "arch")

    def test_is_linear_in_the_upper_loss(self) -> None:
        for dtype, tolerance in (
            (torch.float64, max(self.tolerance, 1e-9)),
            (torch.float32, self.tolerance_float32),
        ):
            exact = self._scaled(dtype)
            for factor in (-3.0, 1e8, 1e-8):
                found = self._scaled(dtype, upper=factor) / factor
                error = relative_error(found, exact)
                assert error < tolerance, (
                    f"upper loss times {factor:g} in {dtype}: relative error {error:.1e}"
                )

    def test_an_exact_inverse_is_so_at_any_scale_of_the_loss(self) -> None:
        if not self.exact:
            return  # (a step size of its own suits one scale)
        for dtype, tolerance in (
            (torch.float64, self.tolerance),
            (torch.float32, self.tolerance_float32),
        ):
            exact = bilevel_quadratic().exact
            for factor in (1e7, 1e-7):
                error = relative_error(self._scaled(dtype, lower=factor).double(), exact)
                assert error < tolerance, (
                    f"lower loss times {factor:g} in {dtype}: relative error {error:.1e}"
                )

    def _scaled(self, dtype: torch.dtype, *, lower: float = 1.0, upper: float = 1.0) -> Tensor:
        """The gradient of `bilevel_quadratic` with both losses multiplied by a number."""
        made = bilevel_quadratic(dtype=dtype)
        problems = [
            Problem(
                problem.name,
                module=problem.module,
                optimizer=problem.optimizers[problem.name],
                loss=_times(factor, problem.loss, read),
            )
            for problem, factor, read in zip(made.problems, (lower, upper), "xw", strict=True)
        ]
        return MultilevelOptimizer(problems, self.make_engine()).gradient("x")["v"]

    def test_a_warm_start_at_the_exact_solution_stays_there(self) -> None:
        engine = self.make_engine()
        if "warm_start" not in {option.name for option in fields(engine)}:
            return
        # w minimises ½ (w − x)², and x minimises 2 w: q = v = 2, without any rounding.
        one = torch.ones(1, dtype=torch.float64)
        problems = [
            _problem("w", one, lambda w, batch, *, x: 0.5 * ((w.v - x.v) ** 2).sum()),
            _problem("x", one, lambda x, batch, *, w: 2.0 * w.v.sum()),
        ]
        for problem in problems:
            problem.optimizers[problem.name].param_groups[0]["lr"] = 0.0
        warm: AbstractEngine = replace(cast(Any, engine), warm_start=True)
        optimizer = MultilevelOptimizer(problems, warm)
        for _ in range(3):
            optimizer.step()
            found = float(optimizer.gradient("x")["v"])
            assert math.isfinite(found)
            assert abs(found - 2.0) < 2.0 * self.tolerance or not self.exact


def _times(factor: float, loss: Callable[..., Tensor], read: str) -> Callable[..., Tensor]:
    """A loss that reads one problem, multiplied by a number."""

    def multiplied(own: Vector, reads: dict[str, Vector]) -> Tensor:
        return factor * loss(own, None, **reads)

    return _with_reads(multiplied, [read])
