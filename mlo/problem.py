"""Declares a problem: one level of a multi-level optimization, and what its loss reads."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from mlo.averages import Average, average_from
from mlo.errors import ProblemError, nearest
from mlo.estimators import Estimator, estimator_from

__all__ = ["Problem", "Tensors"]

Tensors = dict[str, Tensor]
"""Parameter (or buffer) name → tensor."""

RESERVED = ("default", "name")
"""Names that a problem cannot have, since they are keys of the mappings in `hypergradient=`."""

READ_ONCE = frozenset(
    {
        "name",
        "module",
        "data",
        "steps",
        "solve_data",
        "players",
        "player_parameters",
        "player_moves",
        "parameters",
        "is_game",
        "reads",
        "compile",
        "generators",
        "estimator",
        "average",
    }
)
"""Settings that are read when an optimizer is made, and not again."""


class Problem:
    """One problem of a multi-level optimization.

    Args:
        name: a Python identifier; other losses read this problem under it.
        module: the module whose trainable parameters this problem optimizes.
        optimizer: a `torch.optim` optimizer over exactly these parameters; for a game also a dict
            player → optimizer.
        loss: `loss(module, batch, *, other, ...)`. The keyword-only arguments name the problems
            that it reads; each is passed as the module of that problem holding the right
            parameters. Returns a scalar, or `(scalar, metrics)`; a game returns `{player: scalar}`
            or `({player: scalar}, metrics)`. Instead of a player's scalar it may return a function
            without arguments that computes it, alone or with metrics. The function is called only
            where this player's loss is needed. All such functions start from one random state.
        data: any iterable of batches, iterated again when exhausted. None passes None as the batch.
        players: makes the problem a game: player → name of the submodule that this player controls.
            The players' parameters must be disjoint and cover the module's. All move
            simultaneously, each down its own loss. Without it the problem is a game of one player:
            the whole module, under the problem's name.
        player_steps: player → its moves in one update of the game, 1 for those not named:
            `{"discriminator": 4}`. Extra moves come first, each on its own batch; then all players
            move together, and that joint move is the one engines differentiate.
        steps: updates of this problem per update of the problems above it.
        scheduler: a learning-rate scheduler (or dict player → scheduler), stepped after each
            update.
        grad_clip: largest Euclidean norm of the gradient, over all parameters of the problem.
        precision: "bf16" evaluates the loss under bfloat16 autocast; None leaves the dtype alone.
        accumulate: number of batches whose losses are averaged in one update.
        warmup_steps: number of rounds, from the start, in which this problem is not updated.
        compile: True, or keyword arguments of `torch.compile`: compiles the module. Compiled
            modules have no double backward, so the problem then needs an engine with
            `finite_difference` products.
        generators: `torch.Generator`s that the loss draws from; replayed like the global random
            state of torch, numpy and `random`. Others, like `numpy.random.default_rng()`, are not
            replayed: keep them out of losses.
        solve_data: batches for the linear solves of implicit engines, drawn anew for each solve;
            None: solves use the batches of the problem's last update. A solve on a minibatch is
            biased (see docs/choosing-an-engine.md): give it larger batches, or several.
        solve_batches: number of those batches that a solve averages its products over.
        estimator: "saga", "spider", "storm" or an `mlo.Estimator`: corrects the problem's gradient
            by what earlier batches have said (docs/stochastic-methods.md).
        average: "ema", "tail", an `mlo.Ema` or `mlo.TailAverage`: an average of the problem's
            iterates, in `MultilevelOptimizer.averages`. It changes nothing in the run.
        before_update: called with the problem before each step of its optimizers. The gradients,
            clipped and checked, are in `parameter.grad`. It may read them; it may change them only
            where no engine differentiates the step.
        after_update: called with the problem after each step of its optimizers and schedulers.
            Logging, validating and averaging weights elsewhere are fine. Where an engine
            differentiates the problem's solution, it must change nothing that a gradient depends
            on.

    Raises:
        ProblemError: where the declaration contradicts itself; the message says what to change.
    """

    def __init__(
        self,
        name: str,
        *,
        module: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer],
        loss: Callable[..., Any],
        data: Iterable[Any] | None = None,
        players: Mapping[str, str] | None = None,
        player_steps: Mapping[str, int] | None = None,
        steps: int = 1,
        scheduler: LRScheduler | Mapping[str, LRScheduler] | None = None,
        grad_clip: float | None = None,
        precision: str | None = None,
        accumulate: int = 1,
        warmup_steps: int = 0,
        compile: bool | Mapping[str, Any] = False,
        generators: Sequence[torch.Generator] = (),
        solve_data: Iterable[Any] | None = None,
        solve_batches: int = 1,
        estimator: Estimator | str | None = None,
        average: Average | str | None = None,
        before_update: Callable[[Problem], None] | None = None,
        after_update: Callable[[Problem], None] | None = None,
    ) -> None:
        if (
            not isinstance(name, str)
            or not name.isidentifier()
            or keyword.iskeyword(name)
            or name in RESERVED
        ):
            raise ProblemError(
                f"Problem name {name!r} is not a Python identifier, or is a keyword or one of "
                f"{', '.join(RESERVED)}. Losses read a problem as a keyword argument of its name: "
                "use letters, digits and underscores."
            )
        if not isinstance(module, nn.Module):
            raise ProblemError(
                f"Problem {name!r}: module is a {type(module).__name__}, not a torch.nn.Module. "
                "Put a bare parameter into a module, for example torch.nn.ParameterDict({'x': "
                "parameter})."
            )
        _check_data(name, data)
        self.name = name
        self.module = module
        self.loss = loss
        self.data = data
        self.steps = _at_least(name, "steps", steps, 1)
        self.accumulate = _at_least(name, "accumulate", accumulate, 1)
        self.warmup_steps = _at_least(name, "warmup_steps", warmup_steps, 0)
        if grad_clip is not None and (isinstance(grad_clip, str) or not grad_clip > 0):
            raise ProblemError(
                f"Problem {name!r}: grad_clip must be positive or None, got {grad_clip!r}."
            )
        self.grad_clip = grad_clip
        if precision not in (None, "bf16"):
            raise ProblemError(
                f"Problem {name!r}: precision must be None or 'bf16', got {precision!r}."
            )
        self.precision = precision
        self.compile = compile
        self.generators = tuple(generators)
        _check_data(name, solve_data)
        self.solve_data = solve_data
        self.solve_batches = _at_least(name, "solve_batches", solve_batches, 1)
        if solve_data is None and solve_batches > 1:
            raise ProblemError(
                f"Problem {name!r}: solve_batches={solve_batches} counts batches of solve_data, "
                "which is missing. Pass solve_data= (the problem's own data will do)."
            )
        self.estimator = self._checked(estimator_from(name, estimator))
        self.average = average_from(name, average)
        self.before_update, self.after_update = before_update, after_update
        self.optimizers: dict[str, Optimizer] = _per_player(name, optimizer)
        self.schedulers: dict[str, LRScheduler] = _per_player(name, scheduler)
        # Frozen parameters are constants, like buffers: nothing here moves or differentiates them.
        self.parameters: dict[str, nn.Parameter] = {
            key: parameter
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        if not self.parameters:
            raise ProblemError(
                f"Problem {name!r}: its module has no parameter that requires gradients, so there "
                "is nothing to optimize."
            )
        self._check_optimizers()
        self._check_schedulers()

        # A problem that is no game is a game of one player: the whole module, under its own name.
        # So derivatives are taken player by player everywhere.
        self.is_game = bool(players)
        self.players = _players(name, players)
        self.player_parameters: dict[str, tuple[str, ...]] = self._assign_parameters()
        self.player_moves = self._player_moves(player_steps or {})
        self.reads, self.optional_reads, self.ignored_defaults = _reads(name, loss)

    def seal(self) -> None:
        """Makes settings that an optimizer has read read-only, so that no change goes unnoticed."""
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_ONCE and self.__dict__.get("_sealed"):
            raise ProblemError(
                f"Problem {self.name!r}: {name} is read when a MultilevelOptimizer is made, and "
                "one was. Make a new Problem, and an optimizer of it, with the new value."
            )
        super().__setattr__(name, value)

    @property
    def solves_on_all_data(self) -> bool:
        """Whether a solve sees all that its data hold, and so estimates nothing."""
        # A list of one batch, or no data at all: the loss is the same at each solve.
        data, used = self.solve_data, self.solve_batches
        if data is None:
            data, used = self.data, self.accumulate
        return data is None or (isinstance(data, Sized) and len(data) <= used)

    @property
    def device(self) -> torch.device:
        """The device of the problem's first parameter."""
        return next(iter(self.parameters.values())).device

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters.values())
        kind = f"game of {', '.join(self.players)}" if self.is_game else type(self.module).__name__
        reads = f", reads {', '.join(self.reads)}" if self.reads else ""
        return f"Problem({self.name!r}: {kind}, {count:,} parameters{reads})"

    def _checked(self, estimator: Estimator | None) -> Estimator | None:
        """Refuses an estimator of single blocks where several batches are averaged."""
        if estimator is not None and estimator.uses_blocks and self.accumulate > 1:
            raise ProblemError(
                f"Problem {self.name!r}: the estimator {estimator.name!r} compares single blocks, "
                f"and accumulate={self.accumulate} averages several batches. Use larger blocks."
            )
        return estimator

    def _player_moves(self, steps: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
        """The players that move in each move of one update; all of them in the last."""
        if unknown := [player for player in steps if player not in self.players]:
            raise ProblemError(
                f"Problem {self.name!r}: player_steps names {unknown[0]!r}, which is none of its "
                f"players. {nearest(unknown[0], list(self.players))}"
            )
        counts = {
            player: _at_least(self.name, f"player_steps[{player!r}]", steps.get(player, 1), 1)
            for player in self.player_parameters
        }
        if min(counts.values()) > 1:
            raise ProblemError(
                f"Problem {self.name!r}: every player makes {min(counts.values())} moves or more "
                f"an update; use steps={min(counts.values())} instead."
            )

        # A player of K moves takes part in the last K, so that all of them make the last one.
        def movers(remaining: int) -> tuple[str, ...]:
            return tuple(player for player, moves in counts.items() if moves >= remaining)

        return tuple(map(movers, range(max(counts.values()), 0, -1)))

    def _check_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            if not hasattr(scheduler, "step"):
                raise ProblemError(
                    f"Problem {self.name!r}: scheduler must be a learning-rate scheduler, got "
                    f"{scheduler!r}."
                )
            # A scheduler of another optimizer would run without a word and change nothing here.
            driven = getattr(scheduler, "optimizer", None)
            if driven is not None and not any(
                driven is optimizer for optimizer in self.optimizers.values()
            ):
                raise ProblemError(
                    f"Problem {self.name!r}: its scheduler drives another optimizer than the "
                    "problem's. Make the scheduler from the optimizer that is passed beside it."
                )

    def _check_optimizers(self) -> None:
        optimized: set[int] = set()
        for optimizer in self.optimizers.values():
            if not isinstance(optimizer, Optimizer):
                raise ProblemError(
                    f"Problem {self.name!r}: optimizer must be a torch.optim optimizer (an object, "
                    f"not its class), got {optimizer!r}."
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ProblemError(
                    f"Problem {self.name!r}: LBFGS evaluates its loss several times a step through "
                    "a closure, which this optimizer does not offer. Use a first-order optimizer."
                )
            members = {
                id(parameter) for group in optimizer.param_groups for parameter in group["params"]
            }
            if optimized & members:
                raise ProblemError(
                    f"Problem {self.name!r}: two of its optimizers hold the same parameter, which "
                    "would move twice. Give each parameter to one optimizer."
                )
            optimized |= members

        # Both ways: a parameter without an optimizer would never move, and an optimizer's own extra
        # parameter would move without belonging to any problem.
        missing = [
            key for key, parameter in self.parameters.items() if id(parameter) not in optimized
        ]
        if missing:
            raise ProblemError(
                f"Problem {self.name!r}: its optimizer lacks {len(missing)} of "
                f"{len(self.parameters)} parameters ({_some(missing)}). Pass all of "
                "module.parameters() to the optimizer, or freeze the others with "
                "requires_grad_(False)."
            )
        foreign = optimized - {id(parameter) for parameter in self.module.parameters()}
        if foreign:
            raise ProblemError(
                f"Problem {self.name!r}: its optimizer also holds {len(foreign)} parameters that "
                "are not in its module. Each problem optimizes its own module only."
            )

    def _assign_parameters(self) -> dict[str, tuple[str, ...]]:
        # Players' submodules must divide the trainable parameters among themselves, without a rest.
        owner: dict[str, str] = {}
        for player, submodule in self.players.items():
            try:
                members = self.module.get_submodule(submodule)
            except AttributeError:
                children = ", ".join(key for key, _ in self.module.named_children())
                raise ProblemError(
                    f"Problem {self.name!r}: player {player!r} names the submodule {submodule!r}, "
                    f"which does not exist. Submodules: {children}."
                ) from None
            prefix = f"{submodule}." if submodule else ""
            for key in (
                f"{prefix}{inner}" for inner, p in members.named_parameters() if p.requires_grad
            ):
                if key in owner:
                    raise ProblemError(
                        f"Problem {self.name!r}: parameter {key!r} belongs to the players "
                        f"{owner[key]!r} and {player!r}. Players control disjoint submodules."
                    )
                owner[key] = player
        unowned = [key for key in self.parameters if key not in owner]
        if unowned:
            raise ProblemError(
                f"Problem {self.name!r}: no player controls {_some(unowned)}. Every trainable "
                "parameter of a game belongs to one player."
            )

        # A player's parameters stay in the module's order, like all lists of tensors of a problem.
        found: dict[str, list[str]] = {player: [] for player in self.players}
        for key in self.parameters:
            found[owner[key]].append(key)
        return {player: tuple(keys) for player, keys in found.items()}


def _at_least(problem: str, option: str, value: int, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ProblemError(
            f"Problem {problem!r}: {option} must be an integer of at least {smallest}, got "
            f"{value!r}."
        )
    return value


def _players(problem: str, players: Any) -> dict[str, str]:
    if not players:
        return {problem: ""}
    if not isinstance(players, Mapping) or not all(
        isinstance(submodule, str) for submodule in players.values()
    ):
        raise ProblemError(
            f"Problem {problem!r}: players must be a dict player → name of its submodule, such as "
            '{"generator": "generator", "discriminator": "discriminator"}, got '
            f"{players!r}."
        )
    if problem in players:
        raise ProblemError(
            f"Problem {problem!r}: a player has the name of the game, under which optimizers of "
            "all players together are kept. Call the player something else."
        )
    return dict(players)


def _per_player(problem: str, value: Any) -> dict[str, Any]:
    """Player → value; one value is the only player's, or of all players together."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {problem: value}


def _check_data(problem: str, data: Any) -> None:
    """Refuses several loaders in one sequence, each of which would count as a batch.

    Raises:
        ProblemError: with what to do.
    """
    if not isinstance(data, (list, tuple)):
        return
    if any(isinstance(entry, (DataLoader, Dataset, Iterator)) for entry in data):
        raise ProblemError(
            f"Problem {problem!r}: data is a {type(data).__name__} of loaders or data sets, whose "
            "entries would each be taken for one batch. Pass one iterable of batches: for several "
            "loaders side by side, an iterable that yields a batch of each as a tuple (a class "
            "whose __iter__ returns zip(first, second)), or give each problem its own."
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def _reads(
    problem: str, loss: Callable[..., Any]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns the problems that a loss reads, those it may read, and its ignored arguments.

    Keyword-only arguments without a default name problems that it reads; those with one name
    problems that it reads if they exist. Positional ones beyond the batch are never passed, so the
    graph refuses them where they name a problem.
    """
    try:
        arguments = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"Problem {problem!r}: the signature of its loss cannot be read ({error}). Wrap it in "
            "a Python function `def loss(module, batch, *, other): ...`."
        ) from error

    # It is called as loss(module, batch, *, other, ...): two positional arguments must fit.
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    variadic = any(a.kind is a.VAR_POSITIONAL for a in arguments)
    required = [a for a in positional if a.default is a.empty]
    if len(required) > 2 or (len(positional) < 2 and not variadic):
        raise ProblemError(
            f"Problem {problem!r}: its loss takes the positional arguments "
            f"({', '.join(a.name for a in positional)}), but it is called as loss(module, batch, "
            "*, other, ...): two positional arguments, then the problems that it reads, behind a *."
        )
    if any(a.kind is a.VAR_KEYWORD for a in arguments):
        raise ProblemError(
            f"Problem {problem!r}: its loss takes "
            f"**{next(a.name for a in arguments if a.kind is a.VAR_KEYWORD)}, from which it cannot "
            "be told what it reads. Name the problems that it reads behind a *."
        )
    keywords = [a for a in arguments if a.kind is a.KEYWORD_ONLY]
    return (
        tuple(a.name for a in keywords if a.default is a.empty),
        tuple(a.name for a in keywords if a.default is not a.empty),
        tuple(a.name for a in positional[2:]),
    )
