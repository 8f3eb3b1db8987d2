"""LFM-CW's architecture gradient written out naively: Eqs. 6-10 as functional updates, then Eq. 4
differentiated in A.

Nothing here uses `mlo`: each update is a plain formula, and one call of `torch.autograd.grad`
differentiates the whole.
"""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn import functional as F


def leaves(module):
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def clipped(grads, max_norm):
    if max_norm is None:
        return grads
    norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return {name: g * factor for name, g in grads.items()}


def sgd(params, grads, optimizer, named):
    """W' = W - lr (momentum · buffer + ∇ + weight decay · W)."""
    (group,) = optimizer.param_groups
    result = {}
    for name, p in params.items():
        g = grads[name] + group["weight_decay"] * p
        buffer = optimizer.state[named[name]].get("momentum_buffer")
        g = g if buffer is None else group["momentum"] * buffer.clone() + g
        result[name] = p - group["lr"] * g
    return result


def safe_sqrt(v):
    """√v with derivative 0 at 0, the limit of Adam's step there."""
    return torch.where(
        v > 0, torch.sqrt(torch.where(v > 0, v, torch.ones_like(v))), torch.zeros_like(v)
    )


def adam(params, grads, optimizer, named):
    (group,) = optimizer.param_groups
    b1, b2 = group["betas"]
    result = {}
    for name, p in params.items():
        g, state = grads[name], optimizer.state[named[name]]
        m0 = state["exp_avg"].clone() if state else torch.zeros_like(p)
        v0 = state["exp_avg_sq"].clone() if state else torch.zeros_like(p)
        t = (float(state["step"]) if state else 0.0) + 1
        m = (b1 * m0 + (1 - b1) * g) / (1 - b1**t)
        v = (b2 * v0 + (1 - b2) * g**2) / (1 - b2**t)
        result[name] = p - group["lr"] * m / (safe_sqrt(v) + group["eps"])
    return result


def grad_of(loss, params, create_graph=True):
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(params.items(), grads, strict=True)
    }


def architecture_gradient(modules, problems, batches, lam, *, synthetic_only=False, game="dcgan"):
    """The gradient of Eq. 4 in A through Eqs. 6-10, from the modules' and optimizers' current
    state.

    Without W1 and the GAN that of plain DARTS (Liu et al. 2019, Eq. 7); with `synthetic_only` Eq.
    19 in the place of Eq. 9; without the GAN alone, with real images in place of generated ones.

    Args:
        modules: copies of w1, gan, w2, arch (their BatchNorm statistics move).
        problems: name → the live problem, read for its optimizers' hyper-parameters and state.
        batches: (train images, train labels, validation images, validation labels), and the images
            that are drawn where there is no generator.
        lam: λ.
    """
    images, labels, val_images, val_labels, *drawn = batches
    arch = leaves(modules.arch)
    mix = functional_call(modules.arch, arch, ())
    w2 = leaves(modules.w2.network)

    def upper(loss):
        """Eqs. 10 and 4."""
        live = dict(problems["w2"].module.network.named_parameters())
        w2_grads = clipped(grad_of(loss, w2), problems["w2"].grad_clip)
        w2_new = sgd(w2, w2_grads, problems["w2"].optimizers["w2"], live)
        value = F.cross_entropy(
            functional_call(modules.w2.network, w2_new, (val_images, mix)), val_labels
        )
        return dict(zip(arch, torch.autograd.grad(value, list(arch.values())), strict=True))

    if modules.w1 is None:
        return upper(
            F.cross_entropy(functional_call(modules.w2.network, w2, (images, mix)), labels)
        )

    # Eq. 6
    w1 = leaves(modules.w1)
    loss = F.cross_entropy(functional_call(modules.w1, w1, (images, mix)), labels)
    live = dict(problems["w1"].module.named_parameters())
    w1_new = sgd(
        w1,
        clipped(grad_of(loss, w1), problems["w1"].grad_clip),
        problems["w1"].optimizers["w1"],
        live,
    )

    if modules.gan is not None:
        # Eqs. 7 and 8, simultaneous
        g, h = leaves(modules.gan.generator), leaves(modules.gan.discriminator)
        noise = torch.randn(len(labels), modules.gan.generator.noise_dim, dtype=images.dtype)
        fakes = functional_call(modules.gan.generator, g, (noise, labels))
        fake = functional_call(modules.gan.discriminator, h, (fakes, labels, mix))
        # The discriminator's own loss, for what it draws and moves, comes before what follows.
        functional_call(modules.gan.discriminator, h, (images, labels, mix))
        if game == "wgan_gp":
            torch.rand(len(labels), 1, 1, 1, dtype=images.dtype)
            functional_call(modules.gan.discriminator, h, (fakes.detach(), labels, mix))
        generator_loss = F.softplus(-fake).mean() if game == "dcgan" else -fake.mean()
        live = dict(problems["gan"].module.generator.named_parameters())
        g_new = adam(g, grad_of(generator_loss, g), problems["gan"].optimizers["generator"], live)

    # Eq. 9
    real = F.cross_entropy(functional_call(modules.w2.network, w2, (images, mix)), labels)
    val_logits = functional_call(modules.w1, w1_new, (val_images, mix))
    val_ce = F.cross_entropy(val_logits, val_labels, reduction="none")
    class_weights = [
        val_ce[val_labels == c].mean()
        if bool((val_labels == c).any())
        else modules.w2.class_losses[c].clone()
        for c in range(len(modules.w2.class_losses))
    ]
    if modules.gan is None:
        (generated,) = drawn
    else:
        noise = torch.randn(len(labels), modules.gan.generator.noise_dim, dtype=images.dtype)
        generated = functional_call(modules.gan.generator, g_new, (noise, labels))
    ce = F.cross_entropy(
        functional_call(modules.w2.network, w2, (generated, mix)), labels, reduction="none"
    )
    synthetic = sum(class_weights[int(y)] * ce[b] for b, y in enumerate(labels)) / len(labels)
    return upper(lam * synthetic if synthetic_only else real + lam * synthetic)
