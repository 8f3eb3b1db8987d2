"""Two rounds of tiny LFM-CW searches in float64; as a script one of several processes: STORE RANK
SIZE OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe

# Name → what differs from the smoke recipe, and how far two processes may be from one. A finite
# difference divides the rounding of its gradients by its step.
SEARCHES = {
    "exact products": ({}, 1e-9),
    "finite differences": ({"hypergradient": "darts"}, 1e-6),
    "PC-DARTS": ({"space": "pcdarts"}, 1e-9),
    "WGAN-GP": ({"generator.name": "wgan_gp"}, 1e-9),
    "BigGAN, four steps of the discriminator": (
        {"generator.name": "biggan", "generator.discriminator_steps": 4},
        1e-9,
    ),
}


def search(name):
    """Loss, gradient norm or parameter → its value, after the search of that name."""
    small = {
        "channels": 4,
        "nodes": 1,
        "batch_size": 16,
        "generator.channels": 4,
        "generator.noise_dim": 4,
    }
    changed, _ = SEARCHES[name]
    overrides = {f"search.{key}": value for key, value in {**small, **changed}.items()}
    recipe = load_recipe("smoke", overrides={**overrides, "distributed.sync_batchnorm": True})
    dataset = load_dataset("digits", Path("data"), 16)
    torch.manual_seed(0)
    modules = build_modules(recipe.search, dataset, dtype=torch.float64)
    train, validation = search_split(dataset, 80, 0)
    optimizer = build_search(recipe, dataset, train, validation, modules, dtype=torch.float64)
    found = {}
    for record in optimizer.run(2):
        found |= {
            f"{record.round}.loss.{name}": loss
            for name, loss in record.losses.items()
            if name != "gan"
        }
        found |= {
            f"{record.round}.loss.gan.{player}": loss
            for player, loss in record.losses["gan"].items()
        }
        found |= {
            f"{record.round}.norm.{name}": norm for name, norm in record.gradient_norms.items()
        }
    for name, problem in optimizer.problems.items():
        found |= {
            f"{name}.{key}": tensor.detach() for key, tensor in problem.module.state_dict().items()
        }
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


if __name__ == "__main__":
    store, rank, size, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    torch.save({name: search(name) for name in SEARCHES}, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()
