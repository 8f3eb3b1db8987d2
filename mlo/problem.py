"""Declares a problem: one level of a multi-level optimization, and what its loss reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from mlo.averages import Average, average_from
from mlo.errors import ProblemError, nearest
from mlo.estimators import Estimator, estimator_from
from mlo.notebook_table import table_html
from mlo.problem_checks import (
    at_least,
    check_data,
    check_module,
    check_name,
    check_optimizers,
    check_schedulers,
    checked_generators,
    checked_norm,
    checked_precision,
    some,
)
from mlo.signatures import NOTHING_READ, check_new_loss, problems_read
from mlo.step_formulas import check_learned_settings
from mlo.tensors import copied_options

__all__ = ["Problem", "Tensors"]

Tensors = dict[str, Tensor]
"""Parameter (or buffer) name → tensor."""

SHOWN_IF_SET = {
    "grad_clip": None, "precision": None, "compile": False, "accumulate": 1,
    "accumulate_solves": 1, "warmup_steps": 0, "restart_from": None, "estimator": None,
    "average": None, "after_step": None, "settings": None,
}  # fmt: skip
"""Options that a notebook shows if they differ from these defaults."""

READ_ONCE = frozenset(
    {
        "name",
        "module",
        "data",
        "steps",
        "accumulate_solves",
        "solve_data",
        "players",
        "player_parameters",
        "player_moves",
        "restart_from",
        "parameters",
        "is_game",
        "reads",
        "compile",
        "generators",
        "after_step",
        "settings",
        "estimator",
        "average",
    }
)
"""Settings that are read only when an optimizer is made."""


class Problem:
    """One problem of a multi-level optimization.

    Args:
        name: a Python identifier; other losses read this problem under it.
        module: the module whose trainable parameters this problem optimizes.
        optimizer: a `torch.optim` optimizer over exactly these parameters. Or several that divide
            them: a list, or a dict name → optimizer; for a game, player → optimizer. One update
            steps them all, and `problem.optimizers` has them by name ("0", "1", … for a list).
        loss: `loss(module, batch, *, other, ...)`. The keyword-only arguments name the problems
            that it reads; each is passed as the module of that problem holding the right
            parameters. Returns a scalar, or `(scalar, metrics)`; a game returns `{player: scalar}`
            or `({player: scalar}, metrics)`. Instead of a player's scalar it may return a function
            without arguments that computes it, alone or with metrics. The function is called only
            if this player's loss is needed. All such functions start from the same random state;
            several draw from a stream of their own, chosen by a number of torch's global generator.
        reads: the names of the problems that a loss with `**problems` reads, if there are many:
            `[f"task{k}" for k in range(100)]`. They are passed in addition to those that it names
            itself.
        data: any iterable of batches, iterated again when exhausted. None passes None as the batch.
            If it has `state_dict` and `load_state_dict`, these save and restore its position; the
            former is called before each batch. Otherwise its passes are counted.
        players: makes the problem a game: player → name of the submodule that this player controls.
            The players' parameters must be disjoint and cover the module's. All move
            simultaneously, each down its own loss. By default the problem is a game of one player:
            the whole module, under the problem's name.
        player_steps: player → its moves in one update of the game, 1 for those not named:
            `{"discriminator": 4}`. Extra moves come first, each on its own batch; then all players
            move together, and that joint move is the one engines differentiate.
        steps: updates of this problem per update of the problems above it.
        scheduler: a learning-rate scheduler, or a list or dict of several, each of which drives one
            of the optimizers. All step after each update, in order, except those of players that do
            not take part in a move (`player_steps`).
        grad_clip: largest Euclidean norm of the gradient, over all parameters of the problem.
        precision: "bf16" evaluates the loss under bfloat16 autocast; None leaves the dtype alone.
        accumulate: number of batches whose losses are averaged in one update.
        accumulate_solves: number of solves of the problems below it, such as tasks, whose gradients
            are averaged in one update. That many times, a round makes all updates below and takes
            one gradient; then the problem moves.
        warmup_steps: number of rounds, from the start, in which this problem does not move while
            the others do. To let an upper problem wait for N rounds of lower ones, give it
            `warmup_steps=N`, whatever their `steps`. Problems above treat it as constant meanwhile.
        compile: True, or keyword arguments of `torch.compile`: compiles the module. Compiled
            modules have no double backward, so the problem then needs an engine without second
            derivatives, such as "darts" or "penalty", or one with `finite_difference` products.
        generators: `torch.Generator`s that the loss draws from; replayed like the global random
            state of torch, numpy and `random`. Others, such as `numpy.random.default_rng()`, are
            not replayed: do not use them in losses.
        solve_data: batches for the linear solves of implicit engines, drawn again for each solve.
            None: solves use the batches of the problem's last update. A solve on a minibatch is
            biased (see docs/choosing-an-engine.md): give it larger batches, or several.
        solve_batches: number of those batches over which a solve averages its products.
        estimator: "saga", "spider", "storm" or an `mlo.Estimator`: uses earlier batches to correct
            the problem's gradient (docs/stochastic-methods.md).
        average: "ema", "tail", an `mlo.Ema` or `mlo.TailAverage`: an average of the problem's
            iterates, in `MultilevelOptimizer.averages`. It changes nothing in the run.
        before_update: called with the problem before each step of its optimizers. The gradients,
            clipped and checked, are in `parameter.grad`. It may read them, and set learning rates
            of the optimizers. It may change gradients, or values of the problem and of those that
            it reads, only if no engine differentiates the step.
        after_update: called with the problem after each step of its optimizers and schedulers. It
            may log, validate or average weights elsewhere. If an engine differentiates the
            problem's solution, it must change nothing that a gradient depends on. The update is
            made by then: if it raises an exception, the round continues with the next update.
        after_step: `after_step(parameters, *, other, ...) -> dict`, a projection or a proximal
            step. It is called after each step of the optimizers with all parameters: name → tensor.
            As `after_step(parameters, made, *, other)` it also gets the number of steps made
            before. It returns the new parameters, of the same shapes. Parameters that it leaves out
            do not change, nor do those of players that take no part in the move (`player_steps`).
            Its keyword-only arguments name problems that it reads, as a loss's do. It is part of
            the solution: engines differentiate it, also with respect to its reads. It must consist
            of differentiable operations and draw no random numbers (see `mlo.constraints`).
        settings: `settings(*, other, ...) -> dict`, settings of the optimizers as functions of
            other problems' values. The keys are "lr", "weight_decay", "momentum", "dampening" of
            `torch.optim.SGD`; "lr", "weight_decay", "betas", "eps" of Adam and AdamW. A value is a
            number or scalar tensor ("betas": a pair of them), or a dict parameter name → scalar or
            tensor of the parameter's shape. With a positional argument, `settings(made, *, other)`,
            it gets the number of steps that the problem has made, for schedules. The optimizer's
            formula makes the step, on its own state. Engines that differentiate steps also
            differentiate with respect to the settings.
        restart_from: a problem listed later, or a submodule of its module: "init", "init.head".
            Each block of `steps` updates starts from the values of its parameters of the same
            names, with fresh optimizers (schedulers stay). A parameter with an extra leading
            dimension starts from copies of the value: many tasks in one problem. The solution is
            then a function of that value, for which `unroll` over all steps and `one_step` (if
            steps=1) are exact. `first_order` passes the gradient on unchanged. For implicit engines
            the loss itself must read the problem, since the solution of a condition forgets its
            start.

    Raises:
        ProblemError: if the declaration contradicts itself; the message says what to change.
    """

    def __init__(
        self,
        name: str,
        *,
        module: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
        loss: Callable[..., Any],
        data: Iterable[Any] | None = None,
        players: Mapping[str, str] | None = None,
        player_steps: Mapping[str, int] | None = None,
        steps: int = 1,
        scheduler: LRScheduler | Sequence[LRScheduler] | Mapping[str, LRScheduler] | None = None,
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
        after_step: Callable[..., Mapping[str, Tensor]] | None = None,
        settings: Callable[..., Mapping[str, Any]] | None = None,
        restart_from: str | None = None,
        accumulate_solves: int = 1,
        reads: Sequence[str] | None = None,
    ) -> None:
        check_name(name)
        check_module(name, module)
        check_data(name, data)
        self.name = name
        self.module = module
        self.loss = loss
        self.data = data
        self.steps = at_least(name, "steps", steps, 1)
        self.accumulate = at_least(name, "accumulate", accumulate, 1)
        self.accumulate_solves = at_least(name, "accumulate_solves", accumulate_solves, 1)
        self.warmup_steps = at_least(name, "warmup_steps", warmup_steps, 0)
        self.grad_clip = checked_norm(name, grad_clip)
        self.precision = checked_precision(name, precision)
        self.compile = compile
        self.generators = checked_generators(name, generators)
        check_data(name, solve_data, option="solve_data")
        self.solve_data = solve_data
        self.solve_batches = at_least(name, "solve_batches", solve_batches, 1)
        if solve_data is None and solve_batches > 1:
            raise ProblemError(
                f"Problem {name!r}: solve_batches={solve_batches} counts batches of solve_data, "
                "which is missing. Pass solve_data= (the problem's own data will do)."
            )
        self.estimator = self._checked(estimator_from(name, estimator))
        self.average = average_from(name, average)
        self.before_update, self.after_update = before_update, after_update
        self.optimizers: dict[str, Optimizer] = _by_name(name, optimizer)
        self.schedulers: dict[str, LRScheduler] = _by_name(name, scheduler)
        # Frozen parameters are like buffers: mlo neither moves nor differentiates them.
        self.parameters: dict[str, nn.Parameter] = {
            key: parameter
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        # Others are made by the module when it runs (a cached mask).
        self.first_buffers = frozenset(key for key, _ in module.named_buffers())
        if not self.parameters:
            raise ProblemError(
                f"Problem {name!r}: its module has no parameter that requires gradients, so there "
                "is nothing to optimize."
            )
        check_optimizers(name, module, self.parameters, self.optimizers)
        # As declared: later a step, a schedule or the user may have moved them.
        self.declared_options: dict[str, list[dict[str, Any]]] = {
            key: list(map(copied_options, optimizer.param_groups))
            for key, optimizer in self.optimizers.items()
        }
        named = isinstance(scheduler, Mapping)
        check_schedulers(name, self.schedulers, self.optimizers, named=named)

        # A problem without players is a game of one player: the whole module, under its own name.
        # So derivatives are taken player by player everywhere.
        self.is_game = bool(players)
        self.players = _players(name, players)
        self.player_parameters: dict[str, tuple[str, ...]] = self._assign_parameters()
        self.player_moves = self._player_moves(player_steps or {})
        if self.accumulate_solves > 1 and len(self.player_moves) > 1:
            raise ProblemError(
                f"Problem {name!r}: accumulate_solves averages the gradient of one move, but with "
                "player_steps an update has several. Drop one of the two."
            )

        # A solution depends on everything that the three functions read, and on its start. Each
        # function is called with the problems that it names.
        self.after_step, self.settings = after_step, settings
        of_loss = problems_read(name, "loss", loss, "module", "batch", reads=_names(name, reads))
        of_step = of_settings = NOTHING_READ
        if after_step is not None:
            of_step = problems_read(
                name, "after_step", after_step, "parameters", "made", optional=1
            )
        if settings is not None:
            check_learned_settings(name, self.optimizers.values())
            of_settings = problems_read(name, "settings", settings, "made", optional=1)
        self.loss_reads, self.ignored_defaults = of_loss.names, of_loss.ignored
        self.after_step_reads, self.settings_reads = of_step.names, of_settings.names
        self.after_step_takes_count = of_step.positional == 2
        self.settings_take_count = of_settings.positional == 1
        required = [*of_loss.required, *of_step.required, *of_settings.required]
        optional = [*of_loss.optional, *of_step.optional, *of_settings.optional]
        self.restart_from = _restart_source(name, restart_from)
        if self.restart_from is not None:
            required.append(self.restart_from.partition(".")[0])
        self.reads = tuple(dict.fromkeys(required))
        self.optional_reads = tuple(n for n in dict.fromkeys(optional) if n not in self.reads)

    def seal(self) -> None:
        """Makes settings that an optimizer has read read-only, so that no change goes unnoticed."""
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_ONCE and self.__dict__.get("_sealed"):
            raise ProblemError(
                f"Problem {self.name!r}: {name} is read when a MultilevelOptimizer is made, and "
                "one has been made. Make a new Problem with the new value, and a new optimizer."
            )
        if name == "loss" and self.__dict__.get("_sealed"):
            check_new_loss(self.name, value, self.loss_reads, self.optional_reads)
        super().__setattr__(name, value)

    @property
    def solves_on_all_data(self) -> bool:
        """Whether a solve sees all of its data, and so estimates nothing."""
        # Whole passes over the same examples, or no data: the loss is the same at each solve.
        data, used = self.solve_data, self.solve_batches
        if data is None:
            data, used = self.data, self.accumulate
        if data is None:
            return True
        count = _fixed_pass(data)
        return count is not None and used % count == 0

    @property
    def runs_compiled(self) -> bool:
        """Whether the module is compiled, as a whole or in parts."""
        modules = self.module.modules()
        return bool(self.compile) or any(m._compiled_call_impl is not None for m in modules)

    @property
    def turns(self) -> int:
        """How often the problem takes its turn in a round per update of those above it."""
        return self.steps * self.accumulate_solves

    @property
    def device(self) -> torch.device:
        """The device of the problem's first parameter."""
        return next(iter(self.parameters.values())).device

    def module_state(self) -> dict[str, Any]:
        """The module's `state_dict`, without buffers that it has made since it was declared."""
        made = {key for key, _ in self.module.named_buffers()} - self.first_buffers
        return {key: value for key, value in self.module.state_dict().items() if key not in made}

    @property
    def size(self) -> int:
        """The number of parameters that the problem optimizes."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def optimizer_names(self) -> str:
        """The classes of its optimizers, in readable form."""
        names = [type(optimizer).__name__ for optimizer in self.optimizers.values()]
        return ", ".join(dict.fromkeys(names))

    @property
    def _kind(self) -> str:
        return f"game of {', '.join(self.players)}" if self.is_game else type(self.module).__name__

    def __repr__(self) -> str:
        reads = f", reads {', '.join(self.reads)}" if self.reads else ""
        return f"Problem({self.name!r}: {self._kind}, {self.size:,} parameters{reads})"

    def _repr_html_(self) -> str:
        """The notebook's view: the declaration, without defaults."""
        rows: list[tuple[str, object]] = [
            ("module", self._kind),
            ("parameters", f"{self.size:,} on {self.device}"),
            ("optimizer", self.optimizer_names),
            ("loss", getattr(self.loss, "__qualname__", type(self.loss).__name__)),
            ("reads", ", ".join(self.reads) or "no other problem"),
            ("steps", self.steps),
        ]
        for name, default in SHOWN_IF_SET.items():
            value = getattr(self, name)
            if value != default:
                rows.append((name, getattr(value, "__qualname__", value)))
        return table_html(f"Problem {self.name}", (), rows)

    def _checked(self, estimator: Estimator | None) -> Estimator | None:
        """Refuses an estimator of single blocks where several batches are averaged."""
        if estimator is not None and estimator.uses_blocks and self.accumulate > 1:
            raise ProblemError(
                f"Problem {self.name!r}: the estimator {estimator.name!r} compares single blocks, "
                f"but accumulate={self.accumulate} averages several batches. Use larger blocks."
            )
        return estimator

    def _player_moves(self, steps: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
        """The players that move in each move of one update; all of them in the last."""
        if unknown := [player for player in steps if player not in self.players]:
            raise ProblemError(
                f"Problem {self.name!r}: player_steps names {unknown[0]!r}, which is not one of "
                f"its players. {nearest(unknown[0], list(self.players))}"
            )
        counts = {
            player: at_least(self.name, f"player_steps[{player!r}]", steps.get(player, 1), 1)
            for player in self.player_parameters
        }
        if min(counts.values()) > 1:
            raise ProblemError(
                f"Problem {self.name!r}: every player makes {min(counts.values())} moves or more "
                f"per update; use steps={min(counts.values())} instead."
            )

        # A player of K moves takes part in the last K, so that all of them make the last one.
        def movers(remaining: int) -> tuple[str, ...]:
            return tuple(player for player, moves in counts.items() if moves >= remaining)

        return tuple(map(movers, range(max(counts.values()), 0, -1)))

    def _assign_parameters(self) -> dict[str, tuple[str, ...]]:
        # The players' submodules must divide all trainable parameters among themselves.
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
                f"Problem {self.name!r}: no player controls {some(unowned)}. Every trainable "
                "parameter of a game belongs to one player."
            )

        # A player's parameters stay in the module's order, like all lists of tensors of a problem.
        found: dict[str, list[str]] = {player: [] for player in self.players}
        for key in self.parameters:
            found[owner[key]].append(key)
        return {player: tuple(keys) for player, keys in found.items()}


def _fixed_pass(data: Iterable[Any]) -> int | None:
    """The number of batches in a pass, if every pass has the same examples; None otherwise.

    A list's passes have, and those of anything else that has a length. (Only of a DataLoader it is
    known how it draws.) An iterator's length, if it has one, is what is left of its only pass.
    """
    if not isinstance(data, DataLoader):
        if isinstance(data, Iterator) or not isinstance(data, Sized):
            return None
        return length_hint(data) or None  # 0 where a wrapped loader has no length (TypeError)
    if isinstance(data.dataset, IterableDataset):
        return None
    sampler: Any = data.sampler
    batches = data.batch_sampler
    if batches is not None:
        if type(batches) is not BatchSampler:
            return None
        sampler = batches.sampler
    if isinstance(sampler, RandomSampler):
        if sampler.replacement or sampler.num_samples != len(sampler.data_source):
            return None
    elif not isinstance(sampler, SequentialSampler | SubsetRandomSampler):
        return None  # it need not even have a length
    if batches is not None and batches.drop_last and len(sampler) % batches.batch_size:
        return None  # other examples are dropped in each shuffled pass
    return len(data) or None


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
            f"Problem {problem!r}: a player has the name of the game, which stands for optimizers "
            "of all players together. Rename the player."
        )
    return dict(players)


def _by_name(problem: str, value: Any) -> dict[str, Any]:
    """Name → value: the names of a dict, numbers for a list, the problem's for a single value."""
    if value is None:
        return {}
    if isinstance(value, (list, tuple)):
        return {str(index): entry for index, entry in enumerate(value)}
    return dict(value) if isinstance(value, Mapping) else {problem: value}


def _names(problem: str, reads: Any) -> tuple[str, ...] | None:
    if reads is None:
        return None
    if isinstance(reads, str) or not all(isinstance(name, str) for name in reads):
        raise ProblemError(
            f"Problem {problem!r}: reads must be a list of names of problems, got {reads!r}."
        )
    return tuple(reads)


def _restart_source(problem: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value.partition(".")[0].isidentifier()):
        return value
    raise ProblemError(
        f"Problem {problem!r}: restart_from must be the name of a problem that is listed later, or "
        f"of a submodule of it, such as 'init' or 'init.head', got {value!r}."
    )
