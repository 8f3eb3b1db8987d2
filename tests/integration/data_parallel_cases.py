"""What the data-parallel tests run, in one process and in several: small graphs, every engine, a
few rounds in float64.

As a script it is one of several processes: `python data_parallel_cases.py STORE RANK SIZE OUT` runs
everything on this process's shards and writes what came out to OUT/RANK.pt.
"""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from started_processes import PATIENCE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import mlo
from mlo.distributed import SyncBatchNorm, global_mean, shard
from mlo.sharding import whole

ROUNDS = 2
PLAYERS = {"generator": "generator", "discriminator": "discriminator"}
BATCH = 8
BETTY = ("betty-cg", "betty-darts", "betty-neumann", "betty-sama")
ENGINES = {
    "neumann": {"num_terms": 6},
    "cg": {"max_steps": 4, "damping": 0.5},
    "minres": {"max_steps": 6},
    "gmres": {"max_steps": 6},
    "normal_cg": {"max_steps": 4, "damping": 0.5},
    "nystrom": {"rank": 3, "max_steps": 3, "damping": 2.0},
    "direct": {"damping": 0.5},
    "outer_product": {"damping": 0.1},
    "sid": {"steps": 4},
    "unroll": {"steps": 3},
    "zeroth_order": {"radius": 0.1, "samples": 3, "steps": 2},
    # Large displacements: those that suit the dtype would magnify rounding, which differs between
    # one process and several.
    "darts": {"step": 0.1},
    "penalty": {"multiplier": 50.0, "steps": 3},
}
"""Options of engines, small enough to be quick and truncated, so that a product too few or too many
shows.
"""


class Net(nn.Module):
    def __init__(self, inputs, hidden, outputs, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(
            0.4 * torch.randn(hidden, inputs, generator=generator, dtype=torch.float64)
        )
        self.second = nn.Parameter(
            0.4 * torch.randn(outputs, hidden, generator=generator, dtype=torch.float64)
        )

    def forward(self, x):
        return torch.tanh(x @ self.first.T) @ self.second.T


class Mix(nn.Module):
    """Something outermost: a vector."""

    def __init__(self, size, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.v = nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=torch.float64))


class Players(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = Net(3, 3, 3, 5)
        self.discriminator = Net(3, 3, 1, 6)


def batches(seed, count=3):
    """Whole batches, inputs [8, 3] and targets [8, 2]; each process takes its rows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(BATCH, 3, generator=generator, dtype=torch.float64),
            torch.randn(BATCH, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def data(seed, parallel):
    return [shard(batch, parallel) if parallel is not None else batch for batch in batches(seed)]


def sgd(module, lr=0.1):
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.7, weight_decay=0.1)


def adam(module, lr=0.02):
    return torch.optim.Adam(module.parameters(), lr=lr, weight_decay=0.05)


def problem(name, module, optimizer, loss, seed, parallel, **options):
    return mlo.Problem(
        name, module=module, optimizer=optimizer, loss=loss, data=data(seed, parallel), **options
    )


# ------------------------------ losses: means over examples


def fit(net, batch, *, mix):
    x, y = batch
    error = ((net(x) - y) ** 2 * (1 + torch.sigmoid(mix.v[:2]))).mean()
    return error + (mix.v.exp().mean() * sum((p**2).sum() for p in net.parameters())), {
        "error": error
    }


def weighted_fit(net, batch, *, mix, teacher):
    x, y = batch
    hard = torch.sigmoid(((teacher(x) - y) ** 2).mean(1))
    return (hard * ((net(x) - y) ** 2).mean(1)).mean() + 0.1 * (mix.v**2).sum() * sum(
        (p**2).sum() for p in net.parameters()
    )


def synthetic_fit(net, batch, *, mix, teacher, gan):
    x, y = batch
    made = gan.generator(x)
    return weighted_fit(net, batch, mix=mix, teacher=teacher) + 0.3 * ((net(made) - y) ** 2).mean()


def game(gan, batch, *, mix):
    x, _ = batch
    scale = 1 + 0.1 * mix.v.sum()
    made = gan.generator(torch.flip(x, (1,)))
    real, fake = gan.discriminator(x), gan.discriminator(made)
    return {
        "generator": (F.softplus(-fake) * scale).mean() + 0.05 * (made**2).mean(),
        "discriminator": (F.softplus(-real) + F.softplus(fake) * scale).mean()
        + 0.05 * sum((p**2).sum() for p in gan.discriminator.parameters()),
    }


def validation(mix, batch, *, net):
    x, y = batch
    return torch.log1p((net(x) - y) ** 2).mean() + 0.01 * (mix.v**2).sum()


def game_validation(mix, batch, *, gan):
    x, _ = batch
    return (gan.discriminator(gan.generator(x)) ** 2).mean() + 0.01 * (mix.v**2).sum()


def low(low, batch, *, mid):
    x, y = batch
    return ((low(x) - y) ** 2 * (1 + torch.sigmoid(mid.v))).mean() + 0.2 * sum(
        (p**2).sum() for p in low.parameters()
    )


def mid(mid, batch, *, low, mix):
    x, y = batch
    return ((low(x) - y) ** 2).mean() * (1 + torch.sigmoid(mix.v[0])) + (mid.v**2).sum()


def top(mix, batch, *, mid):
    x, _ = batch
    return ((x[:, :2] * mid.v).sum(1) ** 2).mean() + (mix.v**2).mean()


# ------------------------------ graphs


def bilevel(parallel):
    net, mix = Net(3, 4, 2, 1), Mix(3, 2)
    return [
        problem("net", net, sgd(net), fit, 11, parallel, steps=2, grad_clip=0.8),
        problem("mix", mix, adam(mix), validation, 12, parallel, accumulate=2),
    ]


def bilevel_adam(parallel):
    net, mix = Net(3, 4, 2, 1), Mix(3, 2)
    return [
        problem("net", net, adam(net), fit, 11, parallel),
        problem("mix", mix, sgd(mix), validation, 12, parallel),
    ]


def chain(parallel):
    teacher, net, mix = Net(3, 2, 2, 3), Net(3, 3, 2, 1), Mix(3, 2)
    return [
        problem("teacher", teacher, sgd(teacher), fit, 13, parallel),
        problem("net", net, sgd(net), weighted_fit, 11, parallel),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]


def diamond(parallel):
    teacher, gan, net, mix = Net(3, 2, 2, 3), Players(), Net(3, 3, 2, 1), Mix(3, 2)
    return [
        problem("teacher", teacher, sgd(teacher), fit, 13, parallel),
        problem("gan", gan, adam(gan), game, 14, parallel, players=PLAYERS),
        problem("net", net, sgd(net), synthetic_fit, 11, parallel),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]


def trilevel(parallel):
    lowest, middle, mix = Net(3, 2, 2, 3), Mix(2, 4), Mix(3, 2)
    return [
        problem("low", lowest, sgd(lowest), low, 13, parallel),
        problem("mid", middle, sgd(middle), mid, 11, parallel),
        problem("mix", mix, adam(mix), top, 12, parallel),
    ]


def two_players(parallel):
    gan, mix = Players(), Mix(3, 2)
    return [
        problem("gan", gan, adam(gan), game, 14, parallel, players=PLAYERS),
        problem("mix", mix, adam(mix), game_validation, 12, parallel),
    ]


def projected(parallel):
    """What follows the step reads the upper problem."""
    net, mix = Net(3, 4, 2, 1), Mix(3, 2)

    def shrink(parameters, *, mix):
        return mlo.constraints.soft_threshold(parameters, 0.02 * mix.v.mean().exp())

    return [
        problem("net", net, sgd(net), fit, 11, parallel, after_step=shrink),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]


def learned_rate(parallel):
    """A rate and a decay of the lower problem's Adam come from the upper problem."""
    net, mix = Net(3, 4, 2, 1), Mix(3, 2)

    def settings(*, mix):
        return {"lr": 0.02 * mix.v[0].exp(), "weight_decay": 0.05 * mix.v[1].exp()}

    return [
        problem("net", net, adam(net), fit, 11, parallel, settings=settings),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]


GRAPHS = {
    f.__name__: f
    for f in (
        bilevel,
        bilevel_adam,
        chain,
        diamond,
        trilevel,
        two_players,
        projected,
        learned_rate,
    )
}


def moved(problems, device):
    """The problems on a device, with their batches."""
    for one in problems:
        one.module.to(device)
        one.data = [tuple(tensor.to(device) for tensor in batch) for batch in one.data]
    return problems


def run_graph(graph, engine, parallel, distributed="exact", rounds=ROUNDS, device=None):
    """Name → value of everything that a run makes: losses, metrics, norms, gradients, parameters;
    None if it is refused.
    """
    problems = GRAPHS[graph](parallel)
    if device is not None:
        problems = moved(problems, device)
    choice = {"name": engine, **ENGINES.get(engine, {})}
    if graph == "trilevel" and engine == "neumann":
        choice["step_size"] = (
            0.4  # "auto" takes ten products more, each of which is differentiated here
        )
    if graph == "diamond" and engine in (
        *("cg", "minres", "nystrom", "outer_product", "penalty"),
        *BETTY,
    ):
        choice = {"default": choice, "gan": "one_step"}  # which refuse games
        if engine in BETTY:
            choice["net"] = (
                "one_step"  # it reads a game of which it uses one player, which fails in Betty
            )
    try:
        optimizer = mlo.MultilevelOptimizer(problems, choice, distributed=distributed)
    except mlo.EngineError as error:
        return {"refused": str(error)}
    found = {"start": optimizer.gradient("mix")["v"]}
    for record in optimizer.run(rounds):
        for key, values in (
            ("loss", record.losses),
            ("metric", record.metrics),
            ("norm", record.gradient_norms),
        ):
            found[f"{record.round}.{key}"] = torch.tensor(
                [
                    n
                    for value in values.values()
                    for n in (value.values() if isinstance(value, dict) else [value])
                ],
                dtype=torch.float64,
            )
    found["gradient"] = optimizer.gradient("mix")["v"]
    for p in problems:
        for key, parameter in p.parameters.items():
            found[f"{p.name}.{key}"] = parameter.detach()
    return found


# ------------------------------ losses that couple examples


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(3, 4, 2, 1)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x):
        return self.net(self.norm(x))


def run_coupled(parallel, distributed="exact"):
    """SyncBatchNorm, means over a class and rows of shared noise, under an exact implicit
    engine.
    """
    net, mix = Normed(), Mix(3, 2)
    net.norm = SyncBatchNorm.convert(net.norm)

    def class_means(net, batch, *, mix):
        x, y = batch
        labels = (y[:, 0] > 0).long()
        errors = ((net(x + 0.1 * shard(torch.randn(BATCH, 3, dtype=torch.float64))) - y) ** 2).mean(
            1
        )
        sums = global_mean(torch.zeros(2, dtype=torch.float64).index_add(0, labels, errors))
        counts = global_mean(torch.bincount(labels, minlength=2).double())
        return ((sums / counts.clamp(min=0.1)) ** 2 * torch.sigmoid(mix.v[:2])).sum() + 0.1 * (
            net.net.first**2
        ).sum()

    problems = [
        problem("net", net, sgd(net), class_means, 11, parallel),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]
    torch.manual_seed(3)
    choice = {"name": "direct", "damping": 0.3}
    if distributed is not None:
        distributed = mlo.DataParallel(sync=distributed, noise="shared")
    optimizer = mlo.MultilevelOptimizer(problems, choice, distributed=distributed)
    *_, record = optimizer.run(ROUNDS)
    found = {
        f"loss.{name}": torch.tensor(loss, dtype=torch.float64)
        for name, loss in record.losses.items()
    }
    found |= {f"net.{key}": tensor.detach() for key, tensor in net.state_dict().items()}
    return found | {"mix": mix.v.detach()}


def run_uneven(parallel, distributed="exact"):
    """A parameter that only some rows use, so that one process's shard may not know of it, and one
    that none uses.
    """
    net, mix = Net(3, 4, 2, 1), Mix(3, 2)
    net.rare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def fit_rows(net, batch, *, mix):
        x, y = batch
        total = 0.1 * (net.first**2).sum() + 0.1 * (net.second**2).sum()
        for row, target in zip(x, y, strict=True):
            made = net(row) * net.rare if target[0] == 9.0 else net(row)
            total = total + (
                (made - target.clamp(max=1)) ** 2 * torch.sigmoid(mix.v[:2])
            ).mean() / len(x)
        return total

    lower = problem("net", net, sgd(net), fit_rows, 11, parallel)
    whole = batches(11)
    for _, targets in whole:
        targets[-1, 0] = 9.0
    lower.data = whole if parallel is None else [shard(batch, parallel) for batch in whole]
    problems = [lower, problem("mix", mix, adam(mix), validation, 12, parallel)]
    optimizer = mlo.MultilevelOptimizer(problems, "unroll", distributed=distributed)
    for _ in optimizer.run(ROUNDS):
        pass
    return {f"net.{key}": p.detach() for key, p in net.named_parameters()} | {"mix": mix.v.detach()}


def resumable(parallel, distributed="exact"):
    """A run whose state one process and several can resume."""
    return mlo.MultilevelOptimizer(bilevel(parallel), {"name": "soba"}, distributed=distributed)


def parameters(optimizer):
    return {
        f"{name}.{k}": p.detach()
        for name, o in optimizer.problems.items()
        for k, p in o.parameters.items()
    }


# ------------------------------ only with several processes


def complaints(parallel):
    """What is said of mistakes that several processes can make: case → message."""
    said = {}

    def noted(case, act, kind):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                act()
            except kind as error:
                said[case] = str(error)
            else:
                said[case] = " ".join(str(warning.message) for warning in caught)

    def forgotten():
        mlo.MultilevelOptimizer(bilevel(parallel), "one_step")

    def all_the_same():
        mlo.MultilevelOptimizer(bilevel(None), "one_step", distributed="exact").step()

    def another_engine():
        mlo.MultilevelOptimizer(
            bilevel(parallel), ("one_step", "cg")[parallel.rank % 2], distributed="exact"
        )

    def another_state():
        optimizer = mlo.MultilevelOptimizer(bilevel(parallel), "one_step", distributed="exact")
        state = optimizer.state_dict()
        state["problems"]["net"]["module"]["first"] += parallel.rank
        optimizer.load_state_dict(state)

    noted("forgotten", forgotten, mlo.ConfigurationError)
    noted("all_the_same", all_the_same, mlo.ConfigurationError)
    noted("another_engine", another_engine, mlo.ConfigurationError)
    noted("another_state", another_state, mlo.ConfigurationError)
    return said


def begun(parallel):
    """Parameters after the start, where every process had initialised its own."""
    problems = bilevel(parallel)
    with torch.no_grad():
        for p in problems[0].module.parameters():
            p.add_(parallel.rank)
    return parameters(mlo.MultilevelOptimizer(problems, "one_step", distributed="exact"))


def noises(parallel, kind):
    """What each process drew inside losses, and its random state afterwards."""
    drawn = []
    torch.manual_seed(5)

    def noisy(net, batch, *, mix):
        drawn.append(torch.rand(3))
        return fit(net, batch, mix=mix)

    net, mix = Net(3, 4, 2, 1), Mix(3, 2)
    problems = [
        problem("net", net, sgd(net), noisy, 11, parallel),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]
    optimizer = mlo.MultilevelOptimizer(
        problems, "one_step", distributed=mlo.DataParallel(noise=kind)
    )
    list(optimizer.run(2))
    return {"drawn": torch.stack(drawn), "state": torch.get_rng_state()}


def linear_bilevel(parallel, sync, engine, rows=64, dim=20):
    """The total gradient of a least-squares problem of which each process has `rows` rows: final
    against exact.
    """
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows * size, dim, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(rows * size, generator=generator, dtype=torch.float64)
    validation_x = torch.randn(rows * size, dim, generator=generator, dtype=torch.float64)
    own = Mix(dim, 7)
    decay = Mix(dim, 8)

    def ridge(own, batch, *, decay):
        x, y = batch
        return (((x * torch.sigmoid(decay.v)) @ own.v - y) ** 2).mean() + 0.1 * (own.v**2).sum()

    def held_out(decay, batch, *, own):
        x, y = batch
        return ((x @ own.v - y) ** 2).mean()

    whole = [(x, y), (validation_x, validation_x.sum(1))]
    batches = [[shard(batch, parallel)] for batch in whole]

    def at(name, module, lr, loss, data, **options):
        return mlo.Problem(
            name,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=lr),
            loss=loss,
            data=data,
            **options,
        )

    unrolled = {"steps": 3, "restart_from": "decay"} if engine == "unroll" else {}
    problems = [
        at("own", own, 0.05, ridge, batches[0], **unrolled),
        at("decay", decay, 0.1, held_out, batches[1]),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine, distributed=sync)
    for _ in optimizer.run(5):
        pass
    return optimizer.gradient("decay")["v"]


def sharded(parallel, engine):
    """A problem whose parameters `fully_shard` divides among the processes, under an outer one that
    is on all of them.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    if parallel is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh)
    mix = Mix(3, 2)
    problems = [
        problem("net", net, adam(net) if engine == "neumann" else sgd(net), fit, 11, parallel),
        problem("mix", mix, adam(mix), validation, 12, parallel),
    ]
    choice = {"name": engine, **ENGINES.get(engine, {})}
    optimizer = mlo.MultilevelOptimizer(
        problems, choice, distributed=None if parallel is None else "exact"
    )
    found = {"start": optimizer.gradient("mix")["v"]}
    for record in optimizer.run(ROUNDS):
        found[f"{record.round}"] = torch.tensor(
            [*record.losses.values(), *record.gradient_norms.values()]
        )
    found |= {key: whole(value) for key, value in parameters(optimizer).items()}
    if parallel is not None:  # fully_shard's own forward still works
        found["forward"] = net(batches(1)[0][0]).detach()
        try:
            optimizer.state_dict()
        except mlo.CheckpointError as error:
            found["refused state"] = str(error)
    return found


class TinyTransformer(nn.Module):
    """The loss of each next token in texts of each source, [sources]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.tokens = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, texts):
        """[rows, sources, 6] → [sources]."""
        x = self.tokens(texts[..., :-1]).flatten(0, 1)
        scores = self.layers(x, mask=self.mask, is_causal=True) @ self.tokens.weight.T
        losses = F.cross_entropy(scores.flatten(0, 1), texts[..., 1:].flatten(), reduction="none")
        return losses.view(*texts.shape[:2], -1).mean((0, 2))


def sharded_transformer(parallel):
    """The weights of two sources of text, by `penalty`, over a transformer that `fully_shard`
    divides layer by layer.
    """
    net = TinyTransformer().double()
    if parallel is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*net.layers.layers, net):
            fully_shard(module, mesh=mesh)
    sources = Mix(2, 5)
    generator = torch.Generator().manual_seed(6)
    texts = torch.randint(7, (2, 4, 2, 6), generator=generator)
    texts = [rows if parallel is None else shard(rows, parallel) for rows in texts]

    def train(net, batch, *, sources):
        return sources.v.softmax(0) @ net(batch)

    def valid(sources, batch, *, net):
        return net(batch).mean()

    problems = [
        mlo.Problem("net", module=net, optimizer=sgd(net), loss=train, data=texts[:1], steps=2),
        mlo.Problem("sources", module=sources, optimizer=adam(sources), loss=valid, data=texts[1:]),
    ]
    optimizer = mlo.MultilevelOptimizer(
        problems,
        {"name": "penalty", "steps": 2, "multiplier": 50.0},
        distributed=None if parallel is None else "exact",
    )
    found = {"start": optimizer.gradient("sources")["v"]}
    list(optimizer.run(ROUNDS))
    return found | {key: whole(value) for key, value in parameters(optimizer).items()}


def sharded_engines():
    return sorted(set(mlo.available_engines()) - set(BETTY))


def refused_sharding(parallel):
    """Messages for what sharded parameters cannot serve."""
    said = []
    for options, engine, distributed in (
        ({}, "one_step", "final"),
        ({}, "one_step", "off"),
        ({"grad_clip": 1.0}, "one_step", "exact"),
    ):
        net = nn.Linear(3, 2).double()
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        mix = Mix(3, 2)
        problems = [
            problem("net", net, sgd(net), fit, 11, parallel, **options),
            problem("mix", mix, adam(mix), validation, 12, parallel),
        ]
        try:
            mlo.MultilevelOptimizer(problems, engine, distributed=distributed)
        except mlo.EngineError as error:
            said.append(str(error))
    return said


def only_several(parallel):
    results = {("complaints", ""): complaints(parallel), ("begun", ""): begun(parallel)}
    for kind in ("own", "shared"):
        results["noises", kind] = noises(parallel, kind)
    for engine in ("direct", "cg", "one_step", "unroll"):
        exact, final = (linear_bilevel(parallel, sync, engine) for sync in ("exact", "final"))
        results["bias", engine] = {"exact": exact, "final": final}
    if parallel.size == 2:
        results |= {("sharded", engine): sharded(parallel, engine) for engine in sharded_engines()}
        results["sharded transformer", ""] = sharded_transformer(parallel)
        results["refused sharding", ""] = {"said": refused_sharding(parallel)}
    return results


# ------------------------------ one process of several


def chosen(graph, size):
    """The engines that a graph runs with: all on the bilevel ones and, with two processes, on most
    graphs.
    """
    available = set(mlo.available_engines()) - (set() if has_betty() else set(BETTY))
    if graph == "bilevel" or (size == 2 and graph not in ("bilevel_adam", "chain")):
        return sorted(available)
    return ["neumann", "one_step", "unroll"] if size == 2 else ["one_step"]


def everything(size, parallel, distributed="exact"):
    results = {
        (graph, engine): run_graph(graph, engine, parallel, distributed)
        for graph in GRAPHS
        for engine in chosen(graph, size)
    }
    results["coupled", "direct"] = run_coupled(parallel, distributed)
    results["uneven", "unroll"] = run_uneven(parallel, distributed)
    return results


def main(store, rank, size, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    parallel = mlo.DataParallel()
    warnings.simplefilter("ignore")
    results = everything(size, parallel)
    # Resumes a state of one process, and leaves a state for one process to resume.
    optimizer = resumable(parallel)
    optimizer.load_state_dict(mlo.load_checkpoint(Path(out) / "single.pt"))
    for _ in optimizer.run(2):
        pass
    results["resumed", "soba"] = parameters(optimizer)
    results |= only_several(parallel)
    if rank == 0:
        mlo.save_checkpoint(optimizer.state_dict(), Path(out) / "several.pt")
    torch.save(results, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def has_betty():
    try:
        mlo.engine_from("betty-darts")
    except mlo.EngineError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
