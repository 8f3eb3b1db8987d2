"""The stochastic methods of the literature, each against its paper's equations written naively.

Lower loss G_i(z, x) and upper loss F_j(z, x) of blocks i and j, in float64, on a fixed sequence of
blocks; v is the papers' approximate solution of the linear system with the sign of mlo's q, so that
the hypergradient is ∇₂F − ∇²₂₁G q.
"""

from __future__ import annotations

import pytest
import torch
from small_blocks import LOWER, UPPER, Blocks

import mlo
from mlo.testing import relative_error

ROUNDS = 24


def positions(optimizer, rounds):
    """(z, x) after each round."""
    for _ in optimizer.run(rounds):
        yield tuple(optimizer.problems[name].module.v.detach().clone() for name in ("z", "x"))


def compare(optimizer, expected, *, rounds=ROUNDS):
    """Every z and x of the expected sequence, to 1e-10."""
    made = list(positions(optimizer, rounds))
    expected = list(expected)
    assert len(made) == len(expected) >= 20
    moved = torch.cat(expected[-1]) - torch.cat(expected[0])
    assert moved.norm() > 1e-2
    for got, wanted in zip(made, expected, strict=True):
        assert relative_error(torch.cat(got), torch.cat(wanted)) < 1e-10


@pytest.fixture
def blocks():
    return Blocks()


ALPHA, GAMMA = 0.05, 0.03


# ------------------------------ SOBA, SABA


def soba(blocks, lower, upper, alpha, gamma, correct):
    """Dagréou et al. (2022), Algorithm 1: all three directions at one point, corrected or not."""
    z, x, q = blocks.z0, blocks.x0, torch.zeros(4, dtype=torch.float64)
    for t, (i, j) in enumerate(zip(lower, upper, strict=True)):
        hessian, mixed = blocks.products(i, z, x, q)
        down, direct = blocks.dF(j, z, x)
        d_z = correct("z", i, blocks.dG(i, z, x))
        d_q = correct("hessian", i, hessian) - correct("down", j, down)
        d_x = correct("direct", j, direct) - correct("mixed", i, mixed)
        z, q, x = z - alpha(t) * d_z, q - alpha(t) * d_q, x - gamma(t) * d_x
        yield z, x


def test_soba_is_the_papers_algorithm_with_its_step_sizes(blocks):
    """With the step sizes α/√(t+1), which all three variables follow."""
    lower, upper = blocks.drawn(LOWER, ROUNDS), blocks.drawn(UPPER, ROUNDS)

    def alpha(t):
        return ALPHA * (t + 1) ** -0.5

    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower"), lower, upper, alpha=alpha, gamma=alpha
    )
    expected = soba(blocks, lower, upper, alpha, alpha, lambda name, i, value: value)
    compare(optimizer, expected)


def test_a_simultaneous_round_of_soba_costs_four_oracles(blocks):
    """Two gradients and two products: the losses are evaluated once each."""
    calls = []
    losses = {"lower": blocks.lower, "upper": blocks.upper}
    blocks.lower = lambda *at: calls.append("lower") or losses["lower"](*at)
    blocks.upper = lambda *at: calls.append("upper") or losses["upper"](*at)
    optimizer = blocks.optimizer(mlo.Soba(step_size="lower"), [0, 1], [0], alpha=ALPHA, gamma=GAMMA)
    list(optimizer.run(8))  # whose updates 1, 2, 4 and 8 are looked at, too
    calls.clear()
    list(optimizer.run(5))
    assert calls == ["lower", "upper"] * 5


def test_saba_is_the_papers_algorithm(blocks):
    """With a table that begins as the paper's: every block visited where all variables start."""
    first = max(LOWER, UPPER)
    lower, upper = blocks.drawn(LOWER, ROUNDS), blocks.drawn(UPPER, ROUNDS)

    def after(rate):
        return lambda t: rate if t >= first else 0.0

    optimizer = blocks.optimizer(
        mlo.Soba(step_size=after(ALPHA)),
        [*range(LOWER), *lower],
        [*range(UPPER), 0, *upper],
        alpha=after(ALPHA),
        gamma=after(GAMMA),
        z={"estimator": "saga"},
        x={"estimator": "saga"},
    )
    list(optimizer.run(first))
    z, x, q = blocks.z0, blocks.x0, torch.zeros(4, dtype=torch.float64)
    w = {
        "z": [blocks.dG(i, z, x) for i in range(LOWER)],
        "hessian": [blocks.products(i, z, x, q)[0] for i in range(LOWER)],
        "mixed": [blocks.products(i, z, x, q)[1] for i in range(LOWER)],
        "down": [blocks.dF(j, z, x)[0] for j in range(UPPER)],
        "direct": [blocks.dF(j, z, x)[1] for j in range(UPPER)],
    }

    def saga(name, i, value):
        """φ_i − w_i + mean of w, of which w_i then is φ_i."""
        corrected = value - w[name][i] + torch.stack(w[name]).mean(0)
        w[name][i] = value
        return corrected

    compare(optimizer, soba(blocks, lower, upper, lambda t: ALPHA, lambda t: GAMMA, saga))


def test_saga_corrects_soba_in_a_round_of_the_usual_order(blocks):
    """One after the other: ∇²₁₁G q_t where z has moved to, then ∇²₂₁G q_{t+1}."""
    lower, upper = blocks.drawn(LOWER, ROUNDS), blocks.drawn(UPPER, ROUNDS)
    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower"),
        lower,
        upper,
        order="lower_first",
        alpha=ALPHA,
        gamma=GAMMA,
        z={"estimator": "saga"},
        x={"estimator": "saga"},
    )
    tables = {}

    def saga(name, i, value):
        """As the rule says: no correction at the first visit, then the mean of the rows so far."""
        rows = tables.setdefault(name, {})
        known = i in rows
        corrected = value - rows[i] + sum(rows.values()) / len(rows) if known else value
        rows[i] = value
        return corrected

    def sequential():
        z, x, q = blocks.z0, blocks.x0, torch.zeros(4, dtype=torch.float64)
        for i, j in zip(lower, upper, strict=True):
            z = z - ALPHA * saga("z", i, blocks.dG(i, z, x))
            down, direct = blocks.dF(j, z, x)
            down, direct = saga("down", j, down), saga("direct", j, direct)
            q = q - ALPHA * (saga("hessian", i, blocks.products(i, z, x, q)[0]) - down)
            x = x - GAMMA * (direct - saga("mixed", i, blocks.products(i, z, x, q)[1]))
            yield z, x

    compare(optimizer, sequential())


# ------------------------------ SRBA, SPABA


def recursive_soba(blocks, lower, upper, alpha, gamma):
    """SRBA and SPABA: all quantities at this point and, on the same batch, at the one before."""
    z, x, q = blocks.z0, blocks.x0, torch.zeros(4, dtype=torch.float64)
    before = d = None
    for i, j in zip(lower, upper, strict=True):

        def directions(z, x, q, i=i, j=j):
            hessian, mixed = blocks.products(i, z, x, q)
            down, direct = blocks.dF(j, z, x)
            return torch.cat([blocks.dG(i, z, x), hessian - down, direct - mixed])

        if i is None:
            assert j is None
            d = directions(z, x, q)
        else:
            d = d + directions(z, x, q) - directions(*before)
        before = z, x, q
        z, q, x = z - alpha * d[:4], q - alpha * d[4:8], x - gamma * d[8:]
        yield z, x


@pytest.mark.parametrize("whole", ["srba", "spaba"])
def test_srba_and_spaba_are_their_papers_algorithms(blocks, whole):
    """Dagréou et al. (2023), Algorithm 1: all data every q rounds. SPABA: with probability p."""
    lower, upper = blocks.drawn(LOWER, ROUNDS), blocks.drawn(UPPER, ROUNDS)
    for t in range(ROUNDS):
        if t % 7 == 0 if whole == "srba" else t in (0, 3, 4, 15):
            lower[t] = upper[t] = None
    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower"),
        lower,
        upper,
        alpha=ALPHA,
        gamma=GAMMA,
        z={"estimator": "spider"},
        x={"estimator": "spider"},
    )
    compare(optimizer, recursive_soba(blocks, lower, upper, ALPHA, GAMMA))


# ------------------------------ AmIGO, StocBiO


def test_amigo_is_the_papers_algorithm(blocks):
    """Arbel and Mairal (2022), Algorithm 1: T steps of z, N steps of q, each on a fresh batch."""
    T, N = 3, 4
    lower, upper = blocks.drawn(LOWER, ROUNDS * T), blocks.drawn(UPPER, ROUNDS)
    solve = blocks.drawn(LOWER, ROUNDS * (N + 1))
    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower", steps=N, fresh_batches=True),
        lower,
        upper,
        order="lower_first",
        alpha=ALPHA,
        gamma=GAMMA,
        z={"steps": T, "solve_data": [blocks.G(i) for i in solve]},
    )

    def amigo():
        z, x, q = blocks.z0, blocks.x0, torch.zeros(4, dtype=torch.float64)
        z_batches, q_batches = iter(lower), iter(solve)
        for j in upper:
            for _ in range(T):
                z = z - ALPHA * blocks.dG(next(z_batches), z, x)
            down, direct = blocks.dF(j, z, x)
            for _ in range(N):
                q = q - ALPHA * (blocks.products(next(q_batches), z, x, q)[0] - down)
            x = x - GAMMA * (direct - blocks.products(next(q_batches), z, x, q)[1])
            yield z, x

    compare(optimizer, amigo())


def stocbio_gradient(blocks, eta, factors, i, j, z, x):
    """Ji et al. (2021), Algorithms 2 and 3: one batch per factor, one for the mixed product."""
    r, direct = blocks.dF(j, z, x)
    total = r
    for k in factors:
        r = r - eta * blocks.products(k, z, x, r)[0]
        total = total + r
    return direct - blocks.products(i, z, x, eta * total)[1]


def split_batches(sequence, size):
    return [sequence[k : k + size] for k in range(0, len(sequence), size)]


def test_stocbio_is_the_papers_algorithm(blocks):
    D, Q, eta = 3, 4, 0.2
    lower, upper = blocks.drawn(LOWER, ROUNDS * D), blocks.drawn(UPPER, ROUNDS)
    solve = blocks.drawn(LOWER, ROUNDS * (Q + 1))
    optimizer = blocks.optimizer(
        mlo.Neumann(num_terms=Q + 1, step_size=eta, fresh_batches=True, tol=10.0),
        lower,
        upper,
        order="lower_first",
        alpha=ALPHA,
        gamma=GAMMA,
        z={"steps": D, "solve_data": [blocks.G(i) for i in solve]},
    )

    def stocbio():
        z, x, batches = blocks.z0, blocks.x0, iter(lower)
        for j, (*factors, i) in zip(upper, split_batches(solve, Q + 1), strict=True):
            for _ in range(D):
                z = z - ALPHA * blocks.dG(next(batches), z, x)
            x = x - GAMMA * stocbio_gradient(blocks, eta, factors, i, j, z, x)
            yield z, x

    compare(optimizer, stocbio())


# ------------------------------ MRBO, VRBO


def test_mrbo_is_the_papers_algorithm(blocks):
    """Yang et al. (2021), Algorithm 1: STORM on both gradients, at one point, then both move."""
    Q, eta = 3, 0.2
    lower, upper = blocks.drawn(LOWER, ROUNDS), blocks.drawn(UPPER, ROUNDS)
    solve = blocks.drawn(LOWER, ROUNDS * (Q + 1))

    def weight(k):  # α_{k+1} = β_{k+1} = c η_k²
        return 0.9 * (k + 1) ** (-2 / 3)

    storm = mlo.Storm(rate=weight)
    optimizer = blocks.optimizer(
        mlo.Neumann(num_terms=Q + 1, step_size=eta, fresh_batches=True, tol=10.0),
        lower,
        upper,
        alpha=lambda k: ALPHA * (k + 1) ** (-1 / 3),
        gamma=lambda k: GAMMA * (k + 1) ** (-1 / 3),
        z={"estimator": storm, "solve_data": [blocks.G(i) for i in solve]},
        x={"estimator": storm},
    )

    def mrbo():
        z, x, before = blocks.z0, blocks.x0, ()
        sequence = zip(lower, upper, split_batches(solve, Q + 1), strict=True)
        for k, (i, j, (*factors, mixed)) in enumerate(sequence):

            def phi(z, x, factors=factors, mixed=mixed, j=j):
                return stocbio_gradient(blocks, eta, factors, mixed, j, z, x)

            if k == 0:
                u, v = blocks.dG(i, z, x), phi(z, x)
            else:
                a = weight(k)
                u = blocks.dG(i, z, x) + (1 - a) * (u - blocks.dG(i, *before))
                v = phi(z, x) + (1 - a) * (v - phi(*before))
            before = z, x
            eta_k = (k + 1) ** (-1 / 3)
            z, x = z - ALPHA * eta_k * u, x - GAMMA * eta_k * v
            yield z, x

    compare(optimizer, mrbo())


def test_vrbo_is_the_papers_algorithm(blocks):
    """Yang et al. (2021), Algorithm 2. A round here is one of its inner steps.

    The paper's k-th step of x is made in the rounds of which the number is a multiple of m + 2, and
    z rests in them: learning rates of zero. Every q steps of x the round is on a large batch.
    """
    Q, eta, m, period = 3, 0.2, 2, 2
    inner = m + 2
    rounds = 7 * inner
    lower, upper = blocks.drawn(LOWER, rounds), blocks.drawn(UPPER, rounds)
    factors = [blocks.drawn(LOWER, Q) for _ in range(rounds)]
    mixed = blocks.drawn(LOWER, rounds)
    large = [r for r in range(rounds) if r % (period * inner) == 0]
    for r in large:
        lower[r] = upper[r] = mixed[r] = None
        factors[r] = [None] * Q
    solve = [i for r in range(rounds) for i in (*factors[r], mixed[r])]
    optimizer = blocks.optimizer(
        mlo.Neumann(num_terms=Q + 1, step_size=eta, fresh_batches=True, tol=10.0),
        lower,
        upper,
        alpha=lambda r: 0.0 if r % inner == 0 else ALPHA,
        gamma=lambda r: GAMMA if r % inner == 0 else 0.0,
        z={"estimator": "spider", "solve_data": [blocks.G(i) for i in solve]},
        x={"estimator": "spider"},
    )

    def vrbo():
        z, x = blocks.z0, blocks.x0

        def both(r, z, x):
            phi = stocbio_gradient(blocks, eta, factors[r], mixed[r], upper[r], z, x)
            return blocks.dG(lower[r], z, x), phi

        for k in range(rounds // inner):
            if k % period == 0:
                u, v = both(k * inner, z, x)
            z_before, x_before = z, x
            x = x - GAMMA * v
            yield z, x
            for t in range(m + 2):
                r = k * inner + 1 + t
                if r in large or r == rounds:
                    break  # u and v are taken anew before they are used
                u_new, v_new = both(r, z, x)
                u_old, v_old = both(r, z_before, x_before)
                u, v = u + u_new - u_old, v + v_new - v_old
                z_before, x_before = z, x
                if t < m + 1:
                    z = z - ALPHA * u
                    yield z, x

    compare(optimizer, vrbo(), rounds=rounds)
