"""Nothing of the process is changed while a derivative is taken, and threads do not disturb it."""

from __future__ import annotations

import threading

import torch
from started_processes import PATIENCE

import mlo
from mlo.testing import Vector, identical


def build(seed, engine="one_step"):
    generator = torch.Generator().manual_seed(seed)
    w = Vector(torch.randn(4, generator=generator, dtype=torch.float64))
    x = Vector(torch.randn(4, generator=generator, dtype=torch.float64))
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.Adam(w.parameters(), lr=0.1),
            loss=lambda w, _, *, x: ((w.v - x.v) ** 2).sum() + (w.v**4).sum(),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.Adam(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**2).sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def parameters(optimizer):
    return {name: p.parameters["v"].detach().clone() for name, p in optimizer.problems.items()}


def test_a_thread_beside_it_keeps_its_default_dtype():
    """The first steps of Adam make their counters in double precision, in this thread only."""
    wrong, stop, started = [], threading.Event(), threading.Event()

    def beside():
        while not stop.is_set():
            made = torch.zeros(2), torch.tensor(1.0), torch.ones(())
            wrong.extend(tensor.dtype for tensor in made if tensor.dtype != torch.float32)
            started.set()

    thread = threading.Thread(target=beside)
    thread.start()
    assert started.wait(PATIENCE)
    try:
        for seed in range(20):
            build(seed).gradient("x")
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert torch.get_default_dtype() == torch.float32


def test_two_optimizers_in_two_threads_make_the_runs_of_one():
    expected = []
    for seed in range(2):
        optimizer = build(seed)
        list(optimizer.run(20))
        expected.append(parameters(optimizer))
    optimizers = [build(seed) for seed in range(2)]
    threads = [
        threading.Thread(target=lambda optimizer=optimizer: list(optimizer.run(20)))
        for optimizer in optimizers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert identical(expected, [parameters(optimizer) for optimizer in optimizers])


def test_an_update_waits_for_the_one_in_another_thread():
    """Else the noise that one thread draws again would be drawn by the other too."""
    inside, go_on, order = threading.Event(), threading.Event(), []

    first, second = build(0), build(1)
    whole = first.problems["w"].loss

    def slow(w, batch, *, x):
        inside.set()
        assert go_on.wait(PATIENCE)
        order.append("first")
        return whole(w, batch, x=x)

    first.problems["w"].loss = slow
    running = threading.Thread(target=first.step)
    running.start()
    assert inside.wait(PATIENCE)

    waiting = threading.Thread(target=lambda: (second.step(), order.append("second")))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and "second" not in order
    go_on.set()
    running.join()
    waiting.join()
    assert order[0] == "first" and order.count("second") == 1


def test_a_loss_may_run_an_optimizer_of_its_own():
    """In the same thread nothing waits."""
    inner = build(1)
    x = Vector(torch.ones(2).double())

    def loss(x, batch):
        inner.step()
        return (x.v**2).sum()

    problem = mlo.Problem(
        "x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.1), loss=loss
    )
    mlo.MultilevelOptimizer([problem]).step()
    assert inner.round == 1
