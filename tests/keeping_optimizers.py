"""Optimizers of one's own that keep things: a dict, a tensor, a generator, in groups."""

from __future__ import annotations

import torch


class Keeping(torch.optim.SGD):
    """Keeps what a step changes in an attribute: a dict, a tensor, a generator."""

    def __init__(self, parameters, kept):
        super().__init__(parameters, lr=0.1, weight_decay=0.1)
        self.kept = kept()

    def number(self, parameter):
        if isinstance(self.kept, dict):
            return self.kept.setdefault("made", torch.zeros(())).add_(1)
        if isinstance(self.kept, torch.Generator):
            return torch.randn((), generator=self.kept)
        return self.kept.add_(1)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                rate = group["lr"] / (2 + self.number(parameter).sin())
                parameter.sub_(rate * (parameter.grad + group["weight_decay"] * parameter))


class DrawingNoise(Keeping):
    def number(self, parameter):
        return torch.randn(())


class CountingInGroups(Keeping):
    def __init__(self, parameters, kept):
        super().__init__(parameters, kept)
        self.param_groups[0]["made"] = torch.zeros(())

    def number(self, parameter):
        return self.param_groups[0]["made"].add_(1)


class ReferringToItself(Keeping):
    """Reaches its groups by an attribute, as a class with a helper object does."""

    def __init__(self, parameters, kept):
        super().__init__(parameters, kept)
        self.me = self

    def step(self, closure=None):
        return Keeping.step(self.me, closure)
