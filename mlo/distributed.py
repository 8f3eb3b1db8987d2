"""Data parallelism: each process has a shard of every batch; results are those of one process.

All processes hold the same parameters. Let process r, of N, evaluate the loss L_r on its shard. The
loss of the whole batch is L = (1/N) Σ_r L_r, and engines need the derivatives of L. A = ∇²L is the
mean of the A_r, so Aᵀu is a mean of products. An inverse product uses that mean: it is A⁻¹v, not
the mean of the A_r⁻¹v_r. All of this follows if autograd sees L itself. There are two kinds of
tensors,

    kind         value                         cotangent
    replicated   equal on all processes        derivative of L, replicated as well
    local        of this process's shard       derivative of L_r, which is N times that of L

and two operations between them, each the backward pass of the other:

    operation   from → to             forward                backward
    enter       replicated → local    identity               leave, the mean
    leave       local → replicated    mean (an all-reduce)   enter, the identity

The backward pass of enter is the mean, since ∂L/∂θ = (1/N) Σ_r ∂L_r/∂θ. That of leave is the
identity: y = (1/N) Σ_r x_r gives ∂L/∂x_r = (1/N) ∂L/∂y, and the local cotangent is N times that.
Since each is the derivative of the other, derivatives of every order are right.

So a re-evaluation (`Evaluation.losses`) returns leave(L_r(enter(θ), enter(reads))), a function of
replicated tensors whose derivatives are those of L. Engines need no code for it:

- Each product with A or B, exact or by finite differences, costs one all-reduce of a flat buffer.
- Solvers iterate on replicated vectors, so they decide alike on all processes.
- Responses within responses are averaged as often as they are differentiated.
- Each step of an unroll is that of the mean gradient.

A value that couples the examples of a batch (a mean over a class, BatchNorm's statistics) is not a
mean over shards. `global_mean` = enter(leave(x)) makes it one: its forward and its backward pass
are both the mean over the processes.

With `sync="final"` re-evaluations stay local, and each total gradient is averaged once, at its end.
That takes one reduction per update, but the mean of A_r⁻¹v_r is not A⁻¹v.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlo.errors import ConfigurationError, warn_user
from mlo.sharding import gathered, is_sharded

__all__ = ["DataParallel", "SyncBatchNorm", "global_mean", "rank_and_size", "shard"]

OFF = "off"
MODES = ("exact", "final")
NOISES = ("own", "shared")


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """How the processes of a group share the work of one `MultilevelOptimizer`.

    All processes declare the same problems. The data of each yield its own shard of every batch, of
    the same size on all of them. Losses are means over examples; other losses use `global_mean`.
    All processes start from the parameters and buffers of process 0. Whatever evaluates a loss
    (`step`, `gradient`) must be called by all processes alike.

    Attributes:
        sync: "exact": total gradients are those of the concatenated batch, with one all-reduce per
            product with the Hessian. "final": one all-reduce per update, with a bias (see
            docs/distributed.md).
        noise: "own": inside a loss every process has its own random numbers, derived from its
            global random state. Outside nothing is changed, so processes with equal seeds stay
            equal. "shared": the random state is not touched, for losses that draw for the whole
            batch and take their rows with `shard`.
        group: the process group; None is the default one.

    Raises:
        ConfigurationError: for another value of `sync` or `noise`.
    """

    sync: str = "exact"
    noise: str = "own"
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        for option, value, known in (("sync", self.sync, MODES), ("noise", self.noise, NOISES)):
            if value not in known:
                raise ConfigurationError(
                    f"DataParallel: {option} must be one of {', '.join(known)}, got {value!r}."
                )

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def exact(self) -> bool:
        """Whether every evaluation of a loss is averaged."""
        return self.sync == "exact"

    # ------------------------------ replicated and local tensors

    def enter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes local tensors of replicated ones: equal, but their gradients will be averaged.

        All gradients are averaged in one reduction. Sharded tensors are gathered, and their
        gradients averaged and scattered.
        """
        moving = [
            name
            for name, tensor in tensors.items()
            if tensor.requires_grad and not is_sharded(tensor)
        ]
        entered = _Enter.apply(self, *(tensors[name] for name in moving)) if moving else ()
        return gathered({**tensors, **dict(zip(moving, entered, strict=True))})

    def leave(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes replicated tensors of local ones, of the same shapes everywhere: their means."""
        values = list(tensors.values())
        return dict(zip(tensors, _Leave.apply(self, _metas(values), *values), strict=True))

    @torch.no_grad()
    def average(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Returns the means over the processes, by one all-reduce per device and dtype.

        Args:
            tensors: of this process; None counts as zero.
            like: tensors of their shapes, dtypes and devices.

        Returns:
            the means; None where an entry is None on all processes.
        """
        # All tensors of one device and dtype go into one flat buffer: many small reductions would
        # take longer than one large one.
        found: list[Tensor | None] = [None] * len(like)
        buckets: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, meta in enumerate(like):
            buckets[meta.device, meta.dtype].append(index)
        for (device, dtype), members in buckets.items():
            given = [tensors[index] for index in members]
            parts = [
                torch.zeros(like[index].numel(), dtype=dtype, device=device)
                if t is None
                else t.to(dtype).reshape(-1)
                for index, t in zip(members, given, strict=True)
            ]
            # One more number per entry tells whether any process has it. It is read, with a
            # synchronisation, only if this process has none.
            missing = [index for index, t in zip(members, given, strict=True) if t is None]
            has = torch.ones(len(members), dtype=dtype, device=device)
            if missing:
                has = torch.tensor([t is not None for t in given], dtype=dtype, device=device)
            flat = torch.cat([*parts, has])
            dist.all_reduce(flat, group=self.group)
            flat /= self.size
            *means, anywhere = torch.split(flat, [part.numel() for part in parts] + [len(members)])
            somewhere = anywhere.tolist() if missing else [1.0] * len(members)
            for index, mean, share in zip(members, means, somewhere, strict=True):
                if share:
                    found[index] = mean.view(like[index].shape)
        return found

    # ------------------------------ the start

    def begin(self, modules: Mapping[str, nn.Module], description: Iterable[str]) -> None:
        """Checks that all processes declare the same, and gives them process 0's parameters.

        Buffers too are those of process 0.

        Args:
            modules: problem → module.
            description: lines that must be the same on all processes.

        Raises:
            ConfigurationError: naming a line that differs.
        """
        # Shapes and dtypes too, which broadcasting would not notice.
        lines = list(description)
        for name, module in modules.items():
            lines += [
                f"{name}.{key}: {tuple(t.shape)} {t.dtype}"
                for key, t in module.state_dict().items()
                if isinstance(t, Tensor)
            ]
        for rank, theirs in enumerate(self.gather_objects(lines)):
            other = next(
                (pair for pair in zip(lines, theirs, strict=False) if pair[0] != pair[1]), None
            )
            if other is None and len(lines) != len(theirs):
                other = (f"{len(lines)} entries", f"{len(theirs)} entries")
            if other is not None:
                raise ConfigurationError(
                    "Data parallelism needs the same problems on all processes: process "
                    f"{self.rank} has {other[0]!r}, process {rank} has {other[1]!r}."
                )

        # `broadcast` counts processes globally, whatever the group.
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for module in modules.values():
                for tensor in (*module.parameters(), *module.buffers()):
                    if is_sharded(tensor):
                        continue  # every process has a part of its own
                    value = tensor.detach().contiguous()
                    dist.broadcast(value, src=source, group=self.group)
                    tensor.copy_(value)

    def check_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks that tensors have the same bits on all processes.

        Raises:
            ConfigurationError: naming the first one that differs.
        """
        sums = {
            name: _checksum(tensor) for name, tensor in tensors.items() if not is_sharded(tensor)
        }
        for rank, theirs in enumerate(self.gather_objects(sums)):
            for name, value in sums.items():
                if theirs.get(name) != value:
                    raise ConfigurationError(
                        f"{name!r} differs between process {self.rank} and process {rank}. All "
                        "processes must load the same state."
                    )

    def warn_of_equal_batches(self, problem: str, tensors: Sequence[Tensor]) -> None:
        """Warns if all processes got the same batch, and so do the same work."""
        sums = [_checksum(tensor) for tensor in tensors]
        alike = all(theirs == sums for theirs in self.gather_objects(sums))
        if sums and alike:
            warn_user(
                f"Problem {problem!r}: all {self.size} processes see the same batch, so they do "
                "the work of one. Give each its shard: a torch.utils.data.DistributedSampler, or "
                "mlo.distributed.shard of the whole batch."
            )

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def data_parallel(choice: DataParallel | str | None) -> DataParallel | None:
    """Reads the option `distributed=`; None if there is only one process.

    Raises:
        ConfigurationError: for an unknown choice, or several processes without a process group.
    """
    running = dist.is_available() and dist.is_initialized()
    if choice is None or choice == OFF:
        if choice is None and running and dist.get_world_size() > 1:
            warn_user(
                f"A process group of {dist.get_world_size()} processes is initialised, but this "
                "MultilevelOptimizer does not use it: every process optimizes alone. Pass "
                "distributed='exact', or 'off' if you intend that."
            )
        return None
    if isinstance(choice, str):
        if choice not in MODES:
            raise ConfigurationError(
                f"distributed= is {', '.join(map(repr, (*MODES, OFF)))}, None or a DataParallel, "
                f"got {choice!r}."
            )
        choice = DataParallel(sync=choice)
    if not isinstance(choice, DataParallel):
        raise ConfigurationError(
            f"distributed= is a mode or a DataParallel, got {choice!r} ({type(choice).__name__})."
        )
    if not running:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError(
                f"distributed= with WORLD_SIZE={os.environ['WORLD_SIZE']} needs a process group: "
                "call torch.distributed.init_process_group() before the MultilevelOptimizer is "
                "made."
            )
        return None
    if dist.get_rank(choice.group) < 0:
        raise ConfigurationError("This process is not in the process group of distributed=.")
    return choice if choice.size > 1 else None


# ------------------------------ inside a loss

ACTIVE: list[DataParallel | None] = [None]
"""Stack: the parallelism of the loss that is being evaluated is the last entry.

It is not thread-local, because activation checkpointing runs modules again in autograd's threads.
"""


@contextmanager
def inside(parallel: DataParallel | None) -> Iterator[None]:
    """Runs the body with the processes to which `global_mean`, `shard` and the like refer."""
    ACTIVE.append(parallel)
    try:
        yield
    finally:
        ACTIVE.pop()


def global_mean(tensor: Tensor) -> Tensor:
    """The mean over the processes of a tensor of this process's shard, for use inside a loss.

    It can be differentiated any number of times. In a single process, outside the losses of a
    data-parallel optimizer, and in the re-evaluations of `sync="final"` it returns the tensor
    itself. All processes must call it alike.

    A mean over some of a batch's examples, for instance those of one class, is
    global_mean(sums) / global_mean(counts).

    Args:
        tensor: of the same shape on all processes.
    """
    # leave averages, and enter makes the mean a local tensor again, with the mean as its backward.
    parallel = ACTIVE[-1]
    if parallel is None:
        return tensor
    return parallel.enter(parallel.leave({"": tensor}))[""]


def rank_and_size(*, of_loss: bool = False) -> tuple[int, int]:
    """Returns this process's number, and how many there are; (0, 1) for a single one.

    Args:
        of_loss: counts the processes that share the loss being evaluated: only this one outside a
            data-parallel loss, and in the re-evaluations of `sync="final"`. By default all
            processes of the default group are counted, wherever this is called.
    """
    if of_loss:
        parallel = ACTIVE[-1]
        return (0, 1) if parallel is None else (parallel.rank, parallel.size)
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shard(batch: Any, parallel: DataParallel | None = None) -> Any:
    """Returns this process's rows of every tensor in a whole batch.

    Args:
        batch: what a single process would get: tensors, or dicts, lists and tuples of them. The
            first dimension of each is divisible by the number of processes.
        parallel: the processes; by default those of the loss that is being evaluated.

    Raises:
        ConfigurationError: if the rows cannot be divided equally.
    """
    rank, size = rank_and_size(of_loss=True) if parallel is None else (parallel.rank, parallel.size)
    return batch if size == 1 else _rows(batch, rank, size)


def _rows(batch: Any, rank: int, size: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or len(batch) % size:
            raise ConfigurationError(
                f"A tensor of shape {tuple(batch.shape)} cannot be divided equally among {size} "
                "processes. Choose a batch size that is a multiple of them."
            )
        rows = len(batch) // size
        return batch[rank * rows : (rank + 1) * rows]
    if isinstance(batch, Mapping):
        return {key: _rows(value, rank, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_rows(value, rank, size) for value in batch]
        return parts if isinstance(batch, list) else tuple(parts)
    return batch


PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of the whole batch, with derivatives of every order.

    (`torch.nn.SyncBatchNorm` has no second derivative and does not run on CPUs.) Outside a
    data-parallel loss it is plain BatchNorm.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replaces every BatchNorm in `module`, which is returned, by one of these.

        Parameters and buffers stay the same. A subclass of BatchNorm with its own forward pass
        names its counterpart, a subclass of this class, as `synchronized`.

        Raises:
            ConfigurationError: for such a subclass that names none.
        """
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            counterpart = getattr(
                module, "synchronized", cls if type(module) in PLAIN_NORMS else None
            )
            if counterpart is None:
                raise ConfigurationError(
                    f"{type(module).__name__} is a BatchNorm with its own forward pass. Give it "
                    "an attribute `synchronized`: a subclass of mlo.distributed.SyncBatchNorm "
                    "that does the same."
                )
            replaced: _BatchNorm = counterpart(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
            )
            replaced._parameters, replaced._buffers = module._parameters, module._buffers
            replaced.training = module.training
            return replaced
        for name, child in list(module.named_children()):
            converted = cls.convert(child)
            if converted is not child:
                setattr(module, name, converted)
        return module

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [B, C, ...] over all but the channels."""
        own_statistics = self.training or self.running_mean is None
        _, size = rank_and_size(of_loss=True)
        if size == 1 or not own_statistics:
            return super().forward(input)
        self._check_input_dim(input)

        # Two means over the processes, each differentiable: of the values, then of their squared
        # distances from the first. Half precision is normalised in float32, as PyTorch does.
        over = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        values = input if input.dtype == torch.float64 else input.float()
        mean = global_mean(values.mean(over))
        centred = values - mean.view(shape)
        variance = global_mean(centred.square().mean(over))
        if self.training and self.running_mean is not None:
            self._follow(mean.detach(), variance.detach(), size * input.numel() // input.shape[1])
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Moves the running statistics, the variance unbiased as in plain BatchNorm."""
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        )
        # Without a momentum PyTorch keeps the plain mean over all batches so far.
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(
            (variance * (count / max(count - 1, 1))).to(self.running_var.dtype), share
        )


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The running statistics of plain BatchNorm layers, estimated by every process separately."""
    return [
        statistic
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        and not isinstance(layer, SyncBatchNorm)
        for statistic in (layer.running_mean, layer.running_var)
        if statistic is not None
    ]


# ------------------------------ the pair of operations


def _metas(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What `average` needs to know of tensors, without holding their memory."""
    # One element of memory, seen in the tensor's shape.
    return tuple(torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape) for t in tensors)


class _Enter(torch.autograd.Function):
    """Forward: the identity, from replicated to local tensors. Backward: `_Leave`."""

    @staticmethod
    def forward(ctx: Any, parallel: DataParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.parallel, ctx.metas = parallel, _metas(tensors)
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_Leave.apply(ctx.parallel, ctx.metas, *cotangents))


class _Leave(torch.autograd.Function):
    """Forward: the mean over the processes (None: zero). Backward: `_Enter`."""

    @staticmethod
    def forward(
        ctx: Any, parallel: DataParallel, metas: tuple[Tensor, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.parallel, ctx.given = parallel, [tensor is not None for tensor in tensors]
        ctx.set_materialize_grads(False)
        # Copies, not views of the flat buffer: autograd refuses to change such views in place.
        return tuple(
            None if mean is None else mean.clone() for mean in parallel.average(tensors, metas)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # All of them enter, also those to which this process has contributed nothing, so that the
        # graphs of all processes have the same nodes, and reduce in the same order.
        known = {
            str(index): cotangent
            for index, cotangent in enumerate(cotangents)
            if cotangent is not None
        }
        entered = ctx.parallel.enter(known)
        return (
            None,
            None,
            *(entered.get(str(index)) if given else None for index, given in enumerate(ctx.given)),
        )


def _checksum(tensor: Tensor) -> str:
    """Returns text that is equal for tensors of equal bits, and differs otherwise."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
