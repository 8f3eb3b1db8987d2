"""Finds a `torch.autograd.Function` whose backward keeps a part of itself from autograd.

A second derivative of a loss differentiates the backward of each Function in it. Autograd does not
see what that computes under `torch.no_grad()`, from a detached tensor or outside of PyTorch. Nor
does it see how an intermediate of the forward depends on the inputs, whether it is kept as an
attribute or by `save_for_backward`, which links inputs and outputs only. Autograd treats all this
as constant, and the second derivative lacks that part, without an error.

So each Function is called alone. Let B(z) be what its backward returns for z: its inputs and the
cotangents of its outputs. For random directions u and v, autograd's ⟨∇_z ⟨u, B(z)⟩, v⟩ is compared
with the central difference (⟨u, B(z + e v)⟩ − ⟨u, B(z − e v)⟩) / 2e. Rounding, kinks and the
difference's own error change with e, a part that is missing does not. So two values of e tell them
apart. The losses are evaluated twice: the first evaluation shows which Functions there are
(`functions_of`), the second keeps their arguments (`find_hidden_part`).

Two things look like a missing part and are none. Autograd differentiates an output that is saved by
the Function's own backward. That of a surrogate (a spike, a rounded number) or of an iteration that
stops early is not the derivative of forward, which differences see. So where both differ, the
differences are corrected by it. And a backward that assumes a symmetric matrix may mean nothing
off the symmetric ones, so a symmetric argument is moved among them only.

A Function may also be given its gradient as an argument (of an optimal transport, a simulator, a
diffusion model). Alone, it shows nothing: neither its value nor its gradient changes with its
inputs. Where that is so, the gradient of the whole loss is compared likewise. It may be constant.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mlo.advice import EngineAdvice
from mlo.hypergradient.double_backward import (
    EVERYWHERE,
    WITHOUT_SECOND,
    SecondDerivative,
    functions_in,
    is_users,
)
from mlo.randomness import RandomState, replayed

__all__ = ["Displace", "Function", "find_hidden_part", "functions_of", "hidden_part_message"]

DIRECTIONS = 4
"""In how many random directions a part must be missing. (Noise looks like one in 3% of them.)"""

STEADY = 10.0
"""How many times the change between two differences they must be, and what is missing."""

MISSING = 1e-3
"""Which part of the derivative along a direction must be missing."""

JITTER = 0.01
"""How far from the inputs a Function is looked at, relative to them.

At the inputs themselves many entries may be at a kink (zeros after a ReLU, or at the start).
"""

Function = type[torch.autograd.Function]
Inputs = tuple[Any, ...]

Displace = Callable[[Tensor], Tensor]
"""A tensor that stands for a parameter in a loss → what is to stand there instead."""

Losses = Callable[[Displace], AbstractContextManager[Mapping[str, Tensor]]]
"""Evaluates scalars, with their graphs, where each parameter has been displaced."""


class RecordedCalls:
    """A context in which the arguments of all calls of some Functions are kept.

    And of those that are made in it: a function may make a class in each of its calls.

    Args:
        classes: the Functions.

    Attributes:
        inputs: node of the autograd graph → copies of the arguments, which require a gradient if
            the arguments did.
    """

    def __init__(self, classes: Collection[Function]) -> None:
        self._classes = tuple(classes)
        self._own: list[tuple[Function, str, Any]] = []
        self.inputs: dict[Any, Inputs] = {}

    def __enter__(self) -> RecordedCalls:
        for cls in self._classes:
            self._record(cls)
        made: Any = classmethod(self._record_made)
        self._set(torch.autograd.Function, "__init_subclass__", made)
        return self

    def __exit__(self, *_: object) -> None:
        while self._own:
            cls, name, own = self._own.pop()
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)

    def _set(self, cls: Function, name: str, method: Any) -> None:
        self._own.append((cls, name, cls.__dict__.get(name)))
        setattr(cls, name, method)

    def _record_made(self, cls: Function, /, **named: Any) -> None:
        super(torch.autograd.Function, cls).__init_subclass__(**named)
        if is_users(cls):
            self._record(cls)

    def _record(self, cls: Function) -> None:
        # PyTorch looks these methods up in each call, also if it is made by an `apply` that was
        # kept elsewhere. (A Function's context is its node.)
        if cls.setup_context is not torch.autograd.Function.setup_context:
            self._replace(cls, "setup_context", lambda arguments: arguments[0])
        else:
            self._replace(cls, "forward", lambda arguments: arguments)

    def _replace(self, cls: Function, name: str, inputs_of: Any) -> None:
        method = getattr(cls, name)

        @functools.wraps(method)
        def recording(ctx: Any, *arguments: Any, **named: Any) -> Any:
            # (Below torch.func, a class of PyTorch's own stands in the graph.)
            if getattr(ctx, "_forward_cls", None) is cls:
                self.inputs[ctx] = tuple(map(_copy, inputs_of(arguments)))
            return method(ctx, *arguments, **named)

        self._set(cls, name, staticmethod(recording))


def _copy(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def functions_of(losses: Iterable[Tensor], taken: SecondDerivative = EVERYWHERE) -> set[Function]:
    """The users' Functions of which a second derivative of some losses is taken.

    Args:
        losses: scalars, with their graphs.
        taken: which second derivative.
    """
    return {node._forward_cls for loss in losses for node in functions_in(loss, taken)}


def find_hidden_part(
    losses: Losses,
    functions: Collection[Function],
    taken: SecondDerivative = EVERYWHERE,
) -> str | None:
    """The name of a Function whose backward hides a part of itself from autograd, or None.

    One that cannot be called alone is not looked at.

    Args:
        losses: those that call the functions.
        functions: see `functions_of`.
        taken: which second derivative of the losses is taken, in tensors that are displaced.
    """
    with ExitStack() as stack, torch.enable_grad():
        with RecordedCalls(functions) as calls:
            found = stack.enter_context(losses(lambda tensor: tensor))
        alone = list(_distinct_calls(found.values(), calls.inputs, taken))
        hiding = [call.name for call in alone if call.hides_a_part()]
        given = [call.name for call in alone if not hiding and call.is_given_its_gradient()]
    if given and _Whole(losses, taken).hides_a_part():
        hiding = given
    return hiding[0] if hiding else None


def hidden_part_message(problem: str, function: str, advice: EngineAdvice) -> str:
    """What to say of a Function that hides a part, and what to do.

    Args:
        problem: whose loss it is.
        function: its name.
        advice: names other engines.
    """
    return (
        f"Problem {problem!r}: its loss uses the torch.autograd.Function {function!r}, whose "
        "backward hides a part of its derivative from autograd: differences of what it returns "
        "are not what its second derivative says. PyTorch treats as constant what backward "
        "computes under torch.no_grad(), from detached tensors or numbers, and what forward "
        "computes and keeps for it (as ctx.y, or by save_for_backward, which links inputs and "
        "outputs only), or is given as its gradient. The hypergradient lacks that part. Compute it "
        "in backward, from the saved inputs, and try the function with "
        "torch.autograd.gradgradcheck"
        f"{advice.phrase('; or use {}', *WITHOUT_SECOND)}."
    )


def _distinct_calls(
    losses: Iterable[Tensor],
    inputs: Mapping[Any, Inputs],
    taken: SecondDerivative,
) -> Iterator[_Alone]:
    seen: set[tuple[object, ...]] = set()
    for loss in losses:
        for node, derivatives in functions_in(loss, taken).items():
            arguments = inputs.get(node)
            if arguments is None:
                continue
            # Layers that call it with arguments of one kind show the same.
            kind = (node._forward_cls, *map(_kind, arguments), *derivatives)
            if kind in seen:
                continue
            seen.add(kind)
            yield _Alone(node._forward_cls, arguments, derivatives)


def _kind(argument: Any) -> object:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.requires_grad
    # (Of an operation made by torch.library.custom_op, PyTorch adds an argument to each call.)
    added = type(argument).__module__ == "torch._library.autograd"
    plain = isinstance(argument, (bool, int, float, str, tuple, list, type(None)))
    return repr(argument) if plain or added else id(argument)


class _RefusedError(Exception):
    """A Function, called alone, has raised an error."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a Function raises in the body, which may be anything, into one error."""
    try:
        yield
    except Exception as error:
        raise _RefusedError from error


class _Alone:
    """A Function, called alone with arguments near those of one call.

    Args:
        function: what is called.
        arguments: of that call.
        derivatives: for each tensor among them, whether the first derivative is taken in it,
            and the second.
    """

    def __init__(
        self, function: Function, arguments: Inputs, derivatives: Sequence[tuple[bool, bool]]
    ) -> None:
        self._function, self._arguments = function, [_precise(entry) for entry in arguments]
        tensors = [entry for entry in self._arguments if isinstance(entry, Tensor)]
        self._varied = [tensor for tensor in tensors if tensor.requires_grad]
        pairs = zip(tensors, derivatives, strict=True)
        flags = [taken for tensor, taken in pairs if tensor.requires_grad]
        self._first, self._second = [first for first, _ in flags], [second for _, second in flags]
        self._noise, self._generator = RandomState.capture(), torch.Generator().manual_seed(0)

    @property
    def name(self) -> str:
        """The Function's."""
        return self._function.__name__

    def hides_a_part(self) -> bool:
        """Whether a part of B's derivative in one of the tensors that it depends on is missing."""
        if not all(tensor.is_floating_point() for tensor in self._varied):
            return False
        # (What it warns of near its arguments does not concern its user.)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._search()
            except (_RefusedError, RuntimeError):
                return False  # it refuses the arguments, or has no second derivative

    def is_given_its_gradient(self) -> bool:
        """Whether its value is the same at all inputs, so that its gradient comes from outside."""
        try:
            outputs = self._call(self._varied)
            return all(
                torch.equal(one, other)
                for scale in (0.1, 1.0, 10.0)
                for one, other in zip(
                    outputs,
                    self._call([(scale * self._near(x)).requires_grad_() for x in self._varied]),
                    strict=True,
                )
            )
        except (_RefusedError, RuntimeError):
            return False  # it refuses the arguments

    def _search(self) -> bool:
        outputs = self._call(self._varied)
        if not all(tensor.is_floating_point() for tensor in outputs):
            return False
        # Along the tensor itself too: of a norm kept as a number, all else shows little.
        return any(
            all(self._lacks_a_part(outputs, place, radial) for _ in range(DIRECTIONS))
            for place, taken in enumerate([*self._second, *[True] * len(outputs)])
            if taken
            for radial in (False, True)
        )

    def _lacks_a_part(self, outputs: Sequence[Tensor], place: int, radial: bool) -> bool:
        """Whether a part is missing in one tensor of z, along itself or at random."""
        inputs = [(x + JITTER * self._near(x)).detach() for x in self._varied]
        z = [*inputs, *[_drawn(output, self._generator) for output in outputs]]
        v = z[place] if radial else self._near(z[place])
        u = [_of_kind(x, _drawn(x, self._generator)) for x in self._varied]

        def at(moved: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self._weighted(u, [*z[:place], moved, *z[place + 1 :]])

        leaf = z[place].clone().requires_grad_()
        value, at_leaf = at(leaf)
        slope, by_output = _slope(value, leaf, v, at_leaf)

        def difference(e: float) -> float:
            (one, at_one), (other, at_other) = [at(z[place] + sign * e * v) for sign in (1.0, -1.0)]
            found = float(one - other) / (2.0 * e)
            for (weight, claimed), y, x in zip(by_output, at_one, at_other, strict=True):
                # (An output with a backward of zero, as if it were a constant, hides a part.)
                if claimed != 0.0:
                    moved = _inner([weight], [y.detach()]) - _inner([weight], [x.detach()])
                    found += claimed - float(moved) / (2.0 * e)
            return found

        return _is_missing(difference, slope, v.dtype)

    def _weighted(self, u: Sequence[Tensor], z: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """⟨u, B(z)⟩, with its graph if some of z requires a gradient, and the outputs."""
        differentiable = any(entry.requires_grad for entry in z)
        inputs, cotangents = z[: len(self._varied)], z[len(self._varied) :]
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = self._call(inputs)
        with _refusals():
            found = torch.autograd.grad(
                outputs,
                [x for x, flag in zip(inputs, self._first, strict=True) if flag],
                cotangents,
                create_graph=differentiable,
                materialize_grads=True,
            )
        value = _inner(found, [entry for entry, flag in zip(u, self._first, strict=True) if flag])
        return value if differentiable else value.detach(), outputs

    def _call(self, varied: Sequence[Tensor]) -> list[Tensor]:
        """The differentiable outputs for these tensors in place of those that require gradients."""
        # (Copies, since a Function may write into its arguments.)
        rest = iter(varied)
        called = list(self._arguments)
        for place, argument in enumerate(called):
            if isinstance(argument, Tensor):
                called[place] = (next(rest) if argument.requires_grad else argument).clone()
        with torch.enable_grad(), replayed(self._noise):
            # (Not its own `apply`, which may take arguments in another form than `forward`.)
            apply = vars(torch.autograd.Function)["apply"].__get__(None, self._function)
            with _refusals():
                outputs = apply(*called)
        several = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return [out for out in several if isinstance(out, Tensor) and out.requires_grad]

    def _near(self, x: Tensor) -> Tensor:
        """A random displacement of a tensor, as large as itself."""
        return _size(x) * _of_kind(x, _drawn(x, self._generator))


class _Whole:
    """The gradient of losses, along random directions in all that stands for parameters.

    Args:
        losses: evaluates them.
        taken: which second derivative of them is taken.
    """

    def __init__(self, losses: Losses, taken: SecondDerivative) -> None:
        self._losses, self._taken = losses, taken
        self._generator = torch.Generator().manual_seed(0)

    def hides_a_part(self) -> bool:
        """Whether a part of the gradient's derivative is missing along most directions.

        (Along some it may be small beside the other terms of the losses.)
        """
        try:
            return sum(self._lacks_a_part() for _ in range(DIRECTIONS)) > DIRECTIONS // 2
        except _RefusedError:
            return False  # the losses refuse other parameters

    def _lacks_a_part(self) -> bool:
        directions: list[tuple[Tensor, Tensor]] = []
        slope = self._along(directions, 0.0, differentiated=True)

        def difference(e: float) -> float:
            return (self._along(directions, e) - self._along(directions, -e)) / (2.0 * e)

        dtypes = {v.dtype for _, v in directions}
        if not dtypes or not dtypes <= {torch.float32, torch.float64}:
            return False
        return _is_missing(difference, slope, max(dtypes, key=lambda one: torch.finfo(one).eps))

    def _along(
        self,
        directions: list[tuple[Tensor, Tensor]],
        e: float,
        *,
        differentiated: bool = False,
    ) -> float:
        """⟨u, g⟩ of the gradient g where all is displaced by e v, or its derivative along v.

        Args:
            directions: for each tensor u and v, which are drawn if there are none yet.
            e: how far.
            differentiated: whether the derivative is taken, by autograd.
        """
        leaves: list[Tensor] = []

        def displaced(tensor: Tensor) -> Tensor:
            if not (tensor.requires_grad and tensor.is_floating_point()):
                return tensor
            if len(directions) == len(leaves):
                directions.append(self._directions_of(tensor))
            leaves.append((tensor + e * directions[len(leaves)][1]).detach().requires_grad_())
            return leaves[-1]

        with _refusals(), torch.enable_grad(), self._losses(displaced) as losses:
            total = torch.stack([loss.double() for loss in losses.values()]).sum()
            found = torch.autograd.grad(
                total, leaves, create_graph=differentiated, materialize_grads=True
            )
            value = _inner(found, [u for u, _ in directions])
            if differentiated and value.requires_grad:
                found = torch.autograd.grad(value, leaves, materialize_grads=True)
                return float(_inner(found, [v for _, v in directions]))
        return 0.0 if differentiated else float(value.detach())

    def _directions_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        first, second = [
            taken is None or any(tensor is entry for entry in taken)
            for taken in (self._taken.first, self._taken.second)
        ]
        u, v = [_drawn(tensor, self._generator) for _ in range(2)]
        return u * float(first), v * (_size(tensor) * float(second))


def _is_missing(difference: Callable[[float], float], slope: float, dtype: torch.dtype) -> bool:
    """Whether central differences steadily differ from what autograd says.

    Args:
        difference: step e → the difference.
        slope: the same by autograd.
        dtype: of what is moved.
    """
    # The step at which rounding and the difference's own error are about equal.
    e = torch.finfo(dtype).eps ** (1.0 / 3.0)
    wide, narrow = difference(e), difference(e / 2.0)
    change, missing = abs(wide - narrow), abs(narrow - slope)
    # (Next to a pole the slope is far larger than differences, which change.)
    steady = STEADY * change < min(missing, abs(narrow))
    return steady and missing > MISSING * max(abs(narrow), abs(slope))


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor of unit variance, of a tensor's shape."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _size(x: Tensor) -> float:
    """The root mean square of a tensor's entries; 1 if all are zero."""
    return float(x.detach().double().square().mean().sqrt()) or 1.0


def _of_kind(x: Tensor, displacement: Tensor) -> Tensor:
    """A displacement that keeps a matrix symmetric if it is, and not only for being zero."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        return displacement
    skew, rounding = (x - x.mT).abs().amax(), 100 * torch.finfo(x.dtype).eps * x.abs().amax()
    return (displacement + displacement.mT) / 2 if bool(skew < rounding) else displacement


def _slope(
    value: Tensor, x: Tensor, v: Tensor, outputs: Sequence[Tensor]
) -> tuple[float, list[tuple[Tensor, float]]]:
    """The derivative of a value along v by autograd, and what of it flows through each output.

    The latter as the derivative in the output, and what the output's own backward makes of it.
    """
    if not value.requires_grad:
        return 0.0, [(torch.zeros_like(output), 0.0) for output in outputs]
    by_output = []
    with _refusals():
        found, *weights = torch.autograd.grad(
            value, [x, *outputs], retain_graph=True, materialize_grads=True
        )
        for output, weight in zip(outputs, weights, strict=True):
            (back,) = torch.autograd.grad(
                output, x, weight, retain_graph=True, materialize_grads=True
            )
            by_output.append((weight, float(_inner([back], [v]))))
    return float(_inner([found], [v])), by_output


def _precise(argument: Any) -> Any:
    """An argument in a precision in which differences mean something."""
    if isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16):
        return argument.detach().float().requires_grad_(argument.requires_grad)
    return argument


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    pairs = zip(one, other, strict=True)
    return torch.stack([(a.double() * b.double()).sum() for a, b in pairs]).sum()
