"""The layers of the residual generators: conditional BatchNorm, up-sampling, self-attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from lfmcw_app.search_space.outgoing_edges import blocks_of_convolutions

__all__ = ["ConditionalBatchNorm", "SelfAttention", "UpBlock", "initialize", "normalize_spectrally"]

Initialization = Literal["normal", "orthogonal"]


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are functions of the class, and of noise.

    It maps [B, C, H, W] → [B, C, H, W].

    Args:
        channels: C.
        num_classes: the condition is a label [B], and each class has its own scale and shift.
        code_dim: if given, the condition is a code [B, code_dim] instead, and scale and shift are
            linear in it.

    Reference: Dumoulin et al. (2017); de Vries et al. (2017); Brock et al., BigGAN (2019),
        section 3 (the shared code).
    """

    def __init__(self, channels: int, *, num_classes: int, code_dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale: nn.Module
        self.shift: nn.Module
        if code_dim is None:
            self.scale = nn.Embedding(num_classes, channels)
            self.shift = nn.Embedding(num_classes, channels)
        else:
            self.scale = nn.Linear(code_dim, channels, bias=False)
            self.shift = nn.Linear(code_dim, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalises `x`, then scales by 1 + scale(condition) and adds shift(condition)."""
        scale = self.scale(condition)[:, :, None, None]
        shift = self.shift(condition)[:, :, None, None]
        out: Tensor = self.norm(x) * (1.0 + scale) + shift
        return out


class UpBlock(nn.Module):
    """A residual block that doubles the resolution: [B, C_in, H, W] → [B, C_out, 2H, 2W].

    Reference: Gulrajani et al., WGAN-GP (2017), appendix F; Brock et al., BigGAN (2019), appendix
    B, figure 15 (b).
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, num_classes: int, code_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(channels_in, num_classes=num_classes, code_dim=code_dim)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = ConditionalBatchNorm(channels_out, num_classes=num_classes, code_dim=code_dim)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Doubles `x` under `condition`: labels [B], or codes [B, code_dim]."""
        h = self.conv1(_doubled(F.relu(self.norm1(x, condition))))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        # A 1×1 convolution commutes with doubling: at the small resolution it costs a quarter.
        out: Tensor = h + _doubled(self.shortcut(x))
        return out


class SelfAttention(nn.Module):
    """x + γ · attention over all positions, γ = 0 at first: [B, C, H, W] → the same; H and W even.

    The product of queries and keys is written out: fused attention kernels have no second
    derivative, which engines with exact products need.

    Reference: Zhang et al., SAGAN (2019), section 3; keys and values at half the resolution as in
    Brock et al. (2019).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, self.values = max(1, channels // 8), max(1, channels // 2)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, self.values, 1, bias=False)
        self.out = nn.Conv2d(self.values, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Lets every position read every 2×2 patch."""
        query = self.query(x).flatten(2)  # [B, C/8, HW]
        key = F.max_pool2d(self.key(x), 2).flatten(2)  # [B, C/8, HW/4]
        value = F.max_pool2d(self.value(x), 2).flatten(2)  # [B, C/2, HW/4]
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # [B, HW, HW/4]
        read = (value @ attention.transpose(1, 2)).view(len(x), self.values, *x.shape[2:])
        out: Tensor = x + self.gamma * self.out(read)
        return out


def initialize(root: nn.Module, how: Initialization) -> None:
    """Draws the weights of all convolutions, linear layers and embeddings.

    Biases keep PyTorch's initial values.

    Args:
        root: whose layers.
        how: "normal": N(0, 0.02²); "orthogonal": orthonormal rows or columns.

    Reference: Brock et al., BigGAN (2019), section 3: orthogonal; their CIFAR programs: normal.
    """
    for module in root.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            if how == "normal":
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.orthogonal_(module.weight)


def normalize_spectrally(
    root: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)
) -> None:
    """Divides each weight of these layers by its largest singular value, per forward pass.

    The passes in training mode do so. The value comes from a power iteration whose vectors are
    buffers. An `mlo` re-evaluation works on copies of them, so it repeats the division of the
    original evaluation. As in the original, the derivative treats them as constant.

    Call it after the weights are initialised: the vectors start at the singular vectors of what is
    there.

    Args:
        root: whose layers. A convolution's weight [C_out, C_in, k, k] counts as the matrix
            [C_out, C_in·k·k]. The weights of several edges in one convolution of a supernet's cell
            are one matrix each.
        kinds: the kinds of layers.

    Reference: Miyato et al., spectral normalization (2018), algorithm 1.
    """
    blocks = blocks_of_convolutions(root)
    for module in list(root.modules()):
        if not isinstance(module, kinds):
            continue
        weight = module.get_parameter("weight")
        if blocks.get(module, 1) == 1:
            spectral_norm(module)
        else:
            blockwise = _SpectralNormOfBlocks(weight, blocks[module])
            register_parametrization(module, "weight", blockwise)


class _SpectralNormOfBlocks(nn.Module):
    """Spectral norm of each of several weights in one tensor, as if each had a layer.

    The weights stand below one another.

    Args:
        weight: [blocks · C_out, ...].
        blocks: number of weights.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        matrices = self._matrices(weight.detach())
        self.register_buffer("u", F.normalize(torch.randn_like(matrices[:, :, 0]), dim=1))
        self.register_buffer("v", F.normalize(torch.randn_like(matrices[:, 0]), dim=1))
        for _ in range(15):  # as PyTorch's own begins
            self._iterate(matrices)

    def _matrices(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.blocks, weight.shape[0] // self.blocks, -1)

    @torch.no_grad()
    def _iterate(self, matrices: Tensor) -> None:
        self.u.copy_(F.normalize(torch.einsum("bij,bj->bi", matrices, self.v), dim=1))
        self.v.copy_(F.normalize(torch.einsum("bij,bi->bj", matrices, self.u), dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        """Divides each block by its largest singular value, after one power iteration.

        The iteration is made in training mode only.
        """
        matrices = self._matrices(weight)
        if self.training:
            self._iterate(matrices)
        # Copies, since a later pass moves the vectors before this one is differentiated.
        sigma = torch.einsum("bi,bij,bj->b", self.u.clone(), matrices, self.v.clone())
        return (matrices / sigma.view(-1, 1, 1)).view_as(weight)


def _doubled(x: Tensor) -> Tensor:
    """Repeats every pixel 2×2 times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
