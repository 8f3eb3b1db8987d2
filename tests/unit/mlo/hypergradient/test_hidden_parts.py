"""A backward that hides a part of itself from autograd is found, and no other."""

from __future__ import annotations

import gc
import random
import warnings
from contextlib import contextmanager

import pytest
import torch

import mlo
from mlo.errors import EngineError, SolveWarning
from mlo.hypergradient import hidden_parts
from mlo.hypergradient.double_backward import EVERYWHERE, SecondDerivative
from mlo.hypergradient.hidden_parts import find_hidden_part, functions_of
from mlo.testing import Vector, relative_error

silu = torch.nn.functional.silu


def function(forward, backward):
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Own", (torch.autograd.Function,), methods).apply


def saving(compute, *others):
    """A forward that saves its input, and other tensors that it computes."""

    def forward(ctx, x):
        ctx.save_for_backward(x, *[other(x) for other in others])
        return compute(x)

    return forward


def saving_output(compute):
    def forward(ctx, x):
        y = compute(x)
        ctx.save_for_backward(y)
        return y

    return forward


def with_attribute(compute, attribute):
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.kept = attribute(x)
        return compute(x)

    return forward


def of_saved(slope):
    """A backward that multiplies by a function of what was saved."""
    return lambda ctx, g: g * slope(*ctx.saved_tensors)


def slope_of_silu(x, s):
    return s + x * s * (1 - s)


def recomputed(ctx, g):
    (x,) = ctx.saved_tensors
    return g * slope_of_silu(x, x.sigmoid())


def without_grad(ctx, g):
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        s = x.sigmoid()
    return g * slope_of_silu(x, s)


def through_numpy(ctx, g):
    (x,) = ctx.saved_tensors
    return 2 * torch.from_numpy(x.detach().numpy()) * g


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)


def of_normalized(ctx, g):
    x, mean, scale = ctx.saved_tensors
    y = (x - mean) / scale
    return (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True)) / scale


def of_norm(ctx, g):
    (x,) = ctx.saved_tensors
    return g / ctx.kept - x * (g * x).sum() / ctx.kept**3


PARTLY = {
    "an intermediate that is saved": function(saving(silu, torch.sigmoid), of_saved(slope_of_silu)),
    "an intermediate as an attribute": function(
        with_attribute(silu, torch.sigmoid),
        lambda ctx, g: g * slope_of_silu(*ctx.saved_tensors, ctx.kept),
    ),
    "statistics that are saved": function(
        saving(
            normalized,
            lambda x: x.mean(-1, keepdim=True),
            lambda x: x.std(-1, correction=0, keepdim=True),
        ),
        of_normalized,
    ),
    "a norm as a number": function(
        with_attribute(lambda x: x / x.norm(), lambda x: x.norm().item()), of_norm
    ),
    "without gradients": function(saving(silu), without_grad),
    "a detached tensor": function(saving(torch.square), of_saved(lambda x: 2 * x.detach())),
    "NumPy": function(saving(torch.square), through_numpy),
    "an output as an attribute": function(
        with_attribute(torch.tanh, torch.tanh), lambda ctx, g: g * (1 - ctx.kept**2)
    ),
    "a small part": function(
        with_attribute(lambda x: x**2 - 0.1 * x.cos(), torch.sin),
        lambda ctx, g: g * (2 * ctx.saved_tensors[0] + 0.1 * ctx.kept),
    ),
}


def dropped(ctx, x):
    ctx.mask = (torch.rand_like(x) > 0.3).to(x)
    return x * ctx.mask


def doubled_in_place(ctx, x):
    ctx.mark_dirty(x)
    return x.mul_(2.0)


def by_autograd(ctx, g):
    (x,) = ctx.saved_tensors
    with torch.enable_grad():
        return torch.autograd.grad(normalized(x), x, g, create_graph=True)[0]


def of_softmax(y, g):
    return y * (g - (g * y).sum(-1, keepdim=True))


WHOLE = {
    "recomputed": function(saving(silu), recomputed),
    "the output": function(saving_output(torch.exp), of_saved(lambda y: y)),
    "softmax": function(
        saving_output(lambda x: x.softmax(-1)), lambda ctx, g: of_softmax(*ctx.saved_tensors, g)
    ),
    "by autograd": function(saving(normalized), by_autograd),
    "an input as an attribute": function(
        lambda ctx, x: setattr(ctx, "x", x) or x**2, lambda ctx, g: 2 * ctx.x * g
    ),
    "a mask as an attribute": function(
        with_attribute(torch.relu, lambda x: (x > 0).to(x)), lambda ctx, g: g * ctx.kept
    ),
    "relu": function(saving(torch.relu), of_saved(lambda x: x > 0)),
    "relu squared": function(saving(lambda x: x.relu().square()), of_saved(lambda x: 2 * x.relu())),
    "straight through": function(lambda ctx, x: x.sign(), lambda ctx, g: g),
    "clipped": function(saving(torch.round), of_saved(lambda x: x.abs() < 1)),
    "huber": function(
        saving(lambda x: torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5)),
        of_saved(lambda x: x.clamp(-1, 1)),
    ),
    "a pole": function(saving(lambda x: x.abs().log()), of_saved(torch.reciprocal)),
    "sorted": function(
        saving(lambda x: x.sort(-1).values, lambda x: x.argsort(-1)),
        lambda ctx, g: torch.zeros_like(g).scatter(-1, ctx.saved_tensors[1], g),
    ),
    "scaled": function(lambda ctx, x: x.view_as(x), lambda ctx, g: -0.1 * g),
    "dropout": function(dropped, lambda ctx, g: g * ctx.mask),
    "in place": function(doubled_in_place, lambda ctx, g: 2 * g),
    "zero": function(lambda ctx, x: x.sign(), lambda ctx, g: torch.zeros_like(g)),
}


@contextmanager
def evaluated(f, *tensors):
    yield {"w": f(*tensors).double().square().sum()}


def hidden_in(f, *tensors, taken=EVERYWHERE):
    with evaluated(f, *tensors) as losses:
        functions = functions_of(losses.values(), taken)
    return find_hidden_part(
        lambda displaced: evaluated(f, *map(displaced, tensors)), functions, taken
    )


def drawn(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3,), (4, 7), (16, 300)])
@pytest.mark.parametrize("name", PARTLY)
def test_a_hidden_part_is_found(name, shape, dtype):
    assert hidden_in(PARTLY[name], drawn(shape, dtype)) == "Own"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_backward_is_accepted(name, dtype):
    """Also next to kinks and poles, and where all entries are at one."""
    for shape in ((3,), (4, 7), (16, 300)):
        for seed in range(3):
            x = drawn(shape, dtype, seed)
            for at in (x, x.relu(), 0.0 * x):
                assert hidden_in(lambda x: WHOLE[name](x.clone()), at) is None


def rounded(ctx, x, s):
    y = (x / s).round() * s
    ctx.save_for_backward(x, s, y)
    return y


def of_rounded(ctx, g):
    x, s, y = ctx.saved_tensors
    return g, (g * (y - x) / s).sum()


def root_of(ctx, x):
    """y³ + y = x, by three steps of Newton's method, which are too few."""
    y = torch.zeros_like(x)
    for _ in range(3):
        y = y - (y**3 + y - x) / (3 * y**2 + 1)
    ctx.save_for_backward(y)
    return y


def aside(ctx, x):
    """silu(x), and sigmoid(x) as a second output, whose gradient backward ignores."""
    y, s = silu(x), x.sigmoid()
    ctx.save_for_backward(x, s)
    return y, s


def test_a_saved_output_has_the_derivative_of_backward():
    """A surrogate's, or that of an exact solution; but one that is ignored hides a part."""
    step = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert hidden_in(function(rounded, of_rounded), drawn((4, 7)), step) is None
    root = function(root_of, of_saved(lambda y: 1 / (3 * y**2 + 1)))
    assert hidden_in(root, drawn((4, 7))) is None
    ignored = function(aside, lambda ctx, g, _: g * slope_of_silu(*ctx.saved_tensors))
    assert hidden_in(lambda x: ignored(x)[0], drawn((4, 7))) == "Own"


def cholesky(ctx, a):
    factor = torch.linalg.cholesky(a)
    ctx.save_for_backward(a)
    return 2 * factor.diagonal().log().sum()


def of_log_determinant(ctx, g):
    (a,) = ctx.saved_tensors
    return g * torch.cholesky_inverse(torch.linalg.cholesky(a))


def of_kept_inverse(ctx, g):
    return g * torch.cholesky_inverse(torch.linalg.cholesky(ctx.saved_tensors[0].detach()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_symmetric_matrix_is_moved_among_symmetric_ones(dtype):
    """Cholesky's factor depends on one half of it, and the gradient on both."""
    x = drawn((5, 5), dtype).detach()
    a = (x @ x.mT + 5 * torch.eye(5, dtype=dtype)).requires_grad_()
    assert hidden_in(function(cholesky, of_log_determinant), a) is None
    assert hidden_in(function(cholesky, of_kept_inverse), a) == "Own"
    # Zeros do not mean that it is one.
    skew = function(
        with_attribute(lambda x: (x - x.mT).square().sum(), lambda x: x - x.mT),
        lambda ctx, g: 4 * g * ctx.kept,
    )
    assert hidden_in(skew, (0.0 * a).detach().requires_grad_()) == "Own"


def test_half_precision_is_looked_at_in_a_higher_one():
    x = drawn((4, 7), torch.bfloat16)
    assert hidden_in(PARTLY["an intermediate that is saved"], x) == "Own"
    assert hidden_in(WHOLE["recomputed"], x) is None


class Scaled(torch.autograd.Function):
    """s · silu(x) of two tensors and a flag, in the newer style, which may hide sigmoid(x)."""

    @staticmethod
    def forward(x, hides, s):
        return s * silu(x), x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, hides, s = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, s, output[1] if hides else None)

    @staticmethod
    def backward(ctx, g, _):
        x, s, kept = ctx.saved_tensors
        sigmoid = x.sigmoid() if kept is None else kept
        return g * s * slope_of_silu(x, sigmoid), None, g * silu(x)


class Derived(Scaled):
    """The same by inheritance."""


@pytest.mark.parametrize("own", [Scaled, Derived])
@pytest.mark.parametrize("hides", [True, False])
def test_functions_in_the_newer_style_are_looked_at(own, hides):
    """By an `apply` that was kept before, among other arguments; the class is left as it was."""
    before, apply = dict(own.__dict__), own.apply
    found = hidden_in(lambda x, s: apply(x, hides, s)[0], drawn((4, 7)), drawn(7, seed=1))
    assert found == (own.__name__ if hides else None)
    assert dict(own.__dict__) == before
    assert own.setup_context is Scaled.setup_context


@pytest.mark.parametrize("hides", [True, False])
def test_classes_that_each_call_makes_are_looked_at(hides):
    def f(x):
        class Made(Scaled):
            pass

        return Made.apply(x, hides, torch.ones_like(x))[0]

    assert hidden_in(f, drawn((4, 7))) == ("Made" if hides else None)
    assert "__init_subclass__" not in vars(torch.autograd.Function)


@torch.library.custom_op("mlo_tests::silu", mutates_args=())
def own_silu(x: torch.Tensor, hides: bool) -> torch.Tensor:
    return silu(x)


def keep(ctx, inputs, output):
    x, ctx.hides = inputs
    ctx.save_for_backward(x)
    ctx.kept = x.sigmoid()


def of_own_silu(ctx, g):
    (x,) = ctx.saved_tensors
    return g * slope_of_silu(x, ctx.kept if ctx.hides else x.sigmoid()), None


own_silu.register_autograd(of_own_silu, setup_context=keep)


def test_calls_of_one_kind_are_looked_at_once(monkeypatch):
    """Also with other arguments than tensors, and those that PyTorch adds."""
    looks = []
    monkeypatch.setattr(hidden_parts._Alone, "hides_a_part", lambda alone: looks.append(alone))
    own = function(lambda ctx, x, pair: x * pair[0], lambda ctx, g: (g * 2.0, None))
    hidden_in(lambda x: own(own(x, (2.0, 1)), (1.0 + 1.0, 1)), drawn(3))
    assert len(looks) == 1
    hidden_in(lambda x: own_silu(own_silu(x, False), False) + own_silu(x, True), drawn(3))
    assert len(looks) == 3


def test_custom_operations_are_looked_at():
    assert "mlo_tests_silu" in hidden_in(lambda x: own_silu(x, True), drawn((4, 7)))
    assert hidden_in(lambda x: own_silu(x, False), drawn((4, 7))) is None


@torch.library.custom_op("mlo_tests::silu_of_all", mutates_args=())
def silu_of_all(xs: list[torch.Tensor], hides: bool) -> list[torch.Tensor]:
    return [silu(x) for x in xs]


def keep_all(ctx, inputs, output):
    xs, ctx.hides = inputs
    ctx.save_for_backward(*xs)
    ctx.kept = [x.sigmoid() for x in xs]


def of_silu_of_all(ctx, gs):
    kept = ctx.kept if ctx.hides else [x.sigmoid() for x in ctx.saved_tensors]
    along = zip(gs, ctx.saved_tensors, kept, strict=True)
    return [g * slope_of_silu(x, s) for g, x, s in along], None


silu_of_all.register_autograd(of_silu_of_all, setup_context=keep_all)


@pytest.mark.parametrize("hides", [True, False])
def test_operations_on_lists_of_tensors_are_looked_at(hides):
    found = hidden_in(lambda x, y: sum(silu_of_all([x, y], hides)), drawn(3), drawn(3, seed=1))
    assert (found is not None and "silu_of_all" in found) == hides


class Transformed(torch.autograd.Function):
    """x² for torch.func too, whose backward may use a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, hides):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.hides = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * (x.detach() if ctx.hides else x), None


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
@pytest.mark.parametrize("hides", [True, False])
def test_a_function_is_looked_at_beside_torch_func(transform, hides):
    def f(x):
        under = transform(lambda y: Transformed.apply(y, False).sum())
        return Transformed.apply(x, hides).sum() + under(x).sum()

    assert hidden_in(f, drawn(3)) == ("Transformed" if hides else None)


def test_only_the_second_derivative_that_is_taken_counts():
    """The hidden part of `Scaled` is its derivative in x of that in x, or in s of that in x."""
    x, s = drawn((4, 7)), drawn(7, seed=1)

    def f(x, s):
        return Scaled.apply(x, True, s)[0]

    assert hidden_in(f, x, s, taken=SecondDerivative([x], [x])) == "Scaled"
    assert hidden_in(f, x, s, taken=SecondDerivative([x], [s])) is None
    assert hidden_in(f, x, s, taken=SecondDerivative([s])) is None
    assert hidden_in(f, x, s, taken=SecondDerivative([drawn(3)])) is None


def test_a_look_leaves_nothing_behind():
    """Neither the random state moves, nor are arguments or gradients kept."""
    x = drawn((4, 7))
    numbers, others = torch.get_rng_state(), random.getstate()
    with evaluated(lambda x: WHOLE["recomputed"](x), x) as losses:
        functions = functions_of(losses.values())
    del losses
    gc.collect()
    held = sum(type(entry) is torch.Tensor for entry in gc.get_objects())
    find_hidden_part(
        lambda displaced: evaluated(lambda x: WHOLE["recomputed"](x), displaced(x)), functions
    )
    gc.collect()
    assert sum(type(entry) is torch.Tensor for entry in gc.get_objects()) <= held
    assert x.grad is None
    assert torch.equal(numbers, torch.get_rng_state())
    assert others == random.getstate()


@pytest.mark.parametrize("error", [ValueError, KeyError, StopIteration, Exception])
def test_a_function_that_cannot_be_called_alone_is_accepted(error):
    calls = []

    def forward(ctx, x):
        calls.append(len(calls))
        if len(calls) > 2:
            raise error("not now")
        return saving(silu, torch.sigmoid)(ctx, x)

    assert hidden_in(function(forward, of_saved(slope_of_silu)), drawn(3)) is None
    assert len(calls) == 4  # its backward is not looked at, nor its value


def problems(activation, *, inside=False):
    """w fits an activation of itself, or of its product with x, to x; x brings w to 1."""
    w, x = Vector(torch.tensor([0.3, -0.7])), Vector(torch.tensor([0.5, 1.0]))
    lower = mlo.Problem(
        "w",
        module=w.double(),
        optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
        loss=lambda w, _, *, x: (
            (activation(3 * w.v * (x.v if inside else 1.0)) - x.v) ** 2 + w.v**2
        ).sum(),
    )
    upper = mlo.Problem(
        "x",
        module=x.double(),
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: (w.v - 1.0).square().sum(),
    )
    return [lower, upper]


def solved(activation, engine, steps, *, inside=False):
    optimizer = mlo.MultilevelOptimizer(problems(activation, inside=inside), engine)
    for _ in range(steps):
        optimizer.step()
    return optimizer.gradient("x")["v"]


HIDING = PARTLY["an intermediate that is saved"]


@pytest.mark.parametrize("steps", [0, 1])
def test_the_hypergradient_is_said_to_lack_a_part(steps):
    """In a question before the first update too, and once."""
    with pytest.warns(SolveWarning, match=r"'w': .*'Own', whose backward hides a part") as caught:
        wrong = solved(HIDING, "direct", steps)
    assert len([entry for entry in caught if "hides a part" in str(entry.message)]) == 1
    assert relative_error(wrong, solved(silu, "direct", steps)) > 0.1


@pytest.mark.parametrize("engine", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_lacks_nothing_causes_no_warning(engine, steps):
    """One step's derivative in x does not contain it, and finite differences take no second."""
    own = WHOLE["recomputed"] if engine == "cg" else HIDING
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solved(own, engine, steps)
    assert relative_error(found, solved(silu, engine, steps)) < 1e-6


def given(value, slope):
    """A Function that is given its value and its gradient, as libraries in other languages do."""
    own = function(
        lambda ctx, y, s, x: setattr(ctx, "s", s) or y, lambda ctx, g: (None, None, g * ctx.s)
    )

    def applied(x):
        at = x.detach()
        return own(value(at), slope(at), x)

    return applied


def silu_slope(x):
    s = x.sigmoid()
    return s + x * s * (1 - s)


GIVEN = {
    "a smooth gradient": (silu, silu_slope, True),
    "a gradient that is constant in pieces": (torch.abs, torch.sign, False),
    "a linear function": (lambda x: 2 * x, lambda x: torch.full_like(x, 2.0), False),
}
"""What a Function is given → its value, its gradient, whether a second derivative is missing."""


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_given_gradient_is_compared_in_the_whole_loss(name, dtype):
    """Alone, the Function is linear."""
    value, slope, lacks = GIVEN[name]
    own = given(value, slope)
    for shape in ((3,), (4, 7), (16, 300)):
        found = hidden_in(lambda x: own(x) + own(0.1 * x) ** 2, drawn(shape, dtype))
        assert found == ("Own" if lacks else None)


def test_only_the_given_part_that_is_taken_counts():
    """∂²/∂x∂z of s(x) + x z has none; nor does anything in a loss that refuses other values."""
    own, x, z = given(silu, silu_slope), drawn((3,)), drawn((3,), seed=1)

    def loss(x, z):
        return own(x) + x * z

    assert hidden_in(loss, x, z, taken=SecondDerivative([x], [x])) == "Own"
    assert hidden_in(loss, x, z, taken=SecondDerivative([x], [z])) is None

    def at_one_point(y):
        assert torch.equal(y, x)
        return own(y)

    assert hidden_in(at_one_point, x) is None


@pytest.mark.parametrize("engine", ["direct", "darts"])
def test_a_hypergradient_lacks_what_is_given(engine):
    """The finite difference has it: it asks for the gradient again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = solved(given(silu, silu_slope), engine, 1, inside=True)
    error = relative_error(found, solved(silu, engine, 1, inside=True))
    said = any("hides a part" in str(entry.message) for entry in caught)
    assert (said, error > 0.1) == ((True, True) if engine == "direct" else (False, False))


@pytest.mark.parametrize("steps", [0, 1])
def test_darts_is_not_compared_with_what_lacks_a_part(steps):
    """One step's derivative in x contains it here."""
    exact = solved(silu, "one_step", steps, inside=True)
    with pytest.warns(SolveWarning, match="hides a part"):
        assert relative_error(solved(HIDING, "one_step", steps, inside=True), exact) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(solved(HIDING, "darts", steps, inside=True), exact) < 1e-6


def test_a_hidden_backward_is_refused_before_the_first_update():
    def nothing(ctx, g):
        with torch.no_grad():
            return recomputed(ctx, g)

    wholly = function(saving(silu), nothing)
    with pytest.raises(EngineError, match=r"'w': .*computes where autograd does not see it"):
        solved(wholly, "cg", steps=0)
    # Nor is it compared by other engines after updates with one that takes no second derivative.
    optimizer = mlo.MultilevelOptimizer(problems(wholly), "darts")
    optimizer.step()
    comparison = mlo.compare_engines(optimizer, "x", ["darts", "cg"])
    assert "computes where autograd does not see it" in str(comparison)


def test_a_solution_that_is_given_is_looked_at_too():
    for own, hides in ((HIDING, True), (WHOLE["recomputed"], False)):
        x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        w = torch.zeros(1, dtype=torch.float64)
        for _ in range(60):  # w + s(w) = x, by fixed-point iteration
            w = x.detach() - 0.5 * silu(w)

        def loss(params, reads, own=own):
            w, x = params["w"], reads["x"]
            return (0.5 * w**2 - x * w + 0.5 * own(w)).sum()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mlo.implicit_solution({"w": w}, loss=loss, reads={"x": x}, engine="cg")
        assert any("hides a part" in str(entry.message) for entry in caught) == hides
