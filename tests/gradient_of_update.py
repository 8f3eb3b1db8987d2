"""The gradient with which the architecture is really updated."""

from __future__ import annotations


def gradient_of_next_round(optimizer):
    """The gradient with which the real update of `arch` is made in the next round."""
    caught = {}
    arch = optimizer.problems["arch"]

    def catch(*_):
        caught.update({name: p.grad.clone() for name, p in arch.parameters.items()})

    handle = arch.optimizers[arch.name].register_step_pre_hook(catch)
    optimizer.step()
    handle.remove()
    return caught
