"""A regression with a learned decay, on shuffled data with dropout: randomness everywhere."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.testing import Vector


def regression(
    seed=0, *, optimizer=torch.optim.Adam, scheduler=None, hypergradient="one_step", **options
):
    """Ridge-like regression whose log decay is learned, on shuffled data with dropout: randomness
    everywhere.
    """
    torch.manual_seed(seed)
    x = torch.randn(40, 5)
    dataset = TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1))
    net = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
    )
    decay = Vector(torch.tensor([-2.0]))

    def net_loss(net, batch, *, decay):
        inputs, targets = batch
        fit = nn.functional.mse_loss(net(inputs), targets)
        return fit + decay.v.exp().sum() * sum((p**2).sum() for p in net.parameters()), {"fit": fit}

    def decay_loss(decay, batch, *, net):
        inputs, targets = batch
        return nn.functional.mse_loss(net(inputs), targets)

    own = optimizer(net.parameters(), lr=0.01)
    lower = mlo.Problem(
        "net",
        module=net,
        optimizer=own,
        loss=net_loss,
        data=DataLoader(dataset, batch_size=8, shuffle=True),
        scheduler=scheduler(own) if scheduler else None,
        **options,
    )
    upper = mlo.Problem(
        "decay",
        module=decay,
        optimizer=torch.optim.Adam(decay.parameters(), lr=0.05),
        loss=decay_loss,
        data=DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True),
    )
    return mlo.MultilevelOptimizer([lower, upper], hypergradient)


def lines(records):
    return [(r.round, r.losses, r.metrics, r.gradient_norms) for r in records]
