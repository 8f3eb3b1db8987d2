"""Triton kernels of the row-wise cross entropy, with sums in float32.

A program takes a tile of rows, and their columns in blocks.

`forward` reads the logits once (a running maximum and a running sum of exponentials over the
blocks); `gradient` reads once and writes once; `second` reads the logits and v once and writes once
where a row fits one block (`WHOLE_ROW`), and reads both twice beyond. Nothing is atomic, so results
repeat bit for bit. A label out of range makes its row NaN.

The statistics that the derivatives start from are the row's maximum m and log Σ exp(x − m), kept
apart: their sum would lose the digits of large logits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tile", "forward", "gradient", "second", "tile"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

WHOLE_ROW = 16384
"""Columns up to which a row is one block of `second`; half as many in float64."""


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, ce_ptr, stats_ptr, rows,
    STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, SHARE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    y = tl.load(y_ptr + row, mask=inside, other=0)
    known = (y >= 0) & (y < COLUMNS)

    # One pass: where a block holds a larger entry, the sum of exponentials so far is rescaled.
    largest = tl.full([ROWS], float("-inf"), SUM)
    total = tl.zeros([ROWS], SUM)
    below = tl.zeros([ROWS], SUM)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = inside[:, None] & (column < COLUMNS)[None, :]
        x_at = x_ptr + row[:, None] * STRIDE + column[None, :]
        x = tl.load(x_at, mask=there, other=float("-inf")).to(SUM)
        larger = tl.maximum(largest, tl.max(x, 1))
        # A row of nothing but −inf so far: −inf − −inf would be NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite[:, None]), 1)
        if SMOOTHING > 0.0:
            # Σ (max − x): max and x are not summed apart, since their sums would cancel.
            if start > 0:
                below += start * (finite - largest)
            below += tl.sum(tl.where(there, finite[:, None] - x, 0.0), 1)
        largest = larger
    label_at = x_ptr + row * STRIDE + tl.where(known, y, 0)
    at_label = tl.load(label_at, mask=inside, other=0.0).to(SUM)

    # −⟨t, log p⟩ in two parts, which are added up only here.
    log_total = tl.log(total)
    off = largest - at_label
    if SMOOTHING > 0.0:
        off = (1.0 - SMOOTHING) * off + SHARE * below
    ce = tl.where(known, off + log_total, float("nan"))
    tl.store(ce_ptr + row, ce, mask=inside)
    tl.store(stats_ptr + row * 2, largest, mask=inside)
    tl.store(stats_ptr + row * 2 + 1, log_total, mask=inside)


@triton.jit
def _target(column, y, SUM: tl.constexpr, SHARE: tl.constexpr, SMOOTHING: tl.constexpr):
    """Targets t = (1 − s) onehot(y) + s / C for a block of columns, [ROWS, BLOCK]."""
    return (column[None, :] == y[:, None]).to(SUM) * (1.0 - SMOOTHING) + SHARE


@triton.jit
def _gradient_kernel(
    x_ptr, stats_ptr, y_ptr, g_ptr, out_ptr, rows,
    STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, SHARE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    y = tl.load(y_ptr + row, mask=inside, other=0)
    known = (y >= 0) & (y < COLUMNS)
    largest = tl.load(stats_ptr + row * 2, mask=inside, other=0.0)
    log_total = tl.load(stats_ptr + row * 2 + 1, mask=inside, other=0.0)
    g = tl.where(known, tl.load(g_ptr + row, mask=inside, other=0.0).to(SUM), float("nan"))
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = inside[:, None] & (column < COLUMNS)[None, :]
        x_at = x_ptr + row[:, None] * STRIDE + column[None, :]
        x = tl.load(x_at, mask=there, other=float("-inf")).to(SUM)
        p = tl.exp((x - largest[:, None]) - log_total[:, None])
        out = g[:, None] * (p - _target(column, y, SUM, SHARE, SMOOTHING))
        out_at = out_ptr + row[:, None] * COLUMNS + column[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _second_kernel(
    x_ptr, stats_ptr, y_ptr, g_ptr, v_ptr, h_ptr, out_ptr, along_ptr, rows,
    X_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, HAS_H: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, SHARE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    y = tl.load(y_ptr + row, mask=inside, other=0)
    known = (y >= 0) & (y < COLUMNS)
    largest = tl.load(stats_ptr + row * 2, mask=inside, other=0.0)
    log_total = tl.load(stats_ptr + row * 2 + 1, mask=inside, other=0.0)
    g = tl.where(known, tl.load(g_ptr + row, mask=inside, other=0.0).to(SUM), float("nan"))
    if HAS_H:
        h = tl.load(h_ptr + row, mask=inside, other=0.0).to(SUM)
    mean = tl.zeros([ROWS], SUM)
    plain = tl.zeros([ROWS], SUM)
    if COLUMNS <= BLOCK:
        # The row is one block, which stays in registers between ⟨p, v⟩ and the output.
        column = tl.arange(0, BLOCK)
        there = inside[:, None] & (column < COLUMNS)[None, :]
        x_at = x_ptr + row[:, None] * X_STRIDE + column[None, :]
        x = tl.load(x_at, mask=there, other=float("-inf")).to(SUM)
        v_at = v_ptr + row[:, None] * V_STRIDE + column[None, :]
        v = tl.load(v_at, mask=there, other=0.0).to(SUM)
        p = tl.exp((x - largest[:, None]) - log_total[:, None])
        mean = tl.sum(p * v, 1)
        plain = tl.sum(v, 1)
        out = g[:, None] * p * (v - mean[:, None])
        if HAS_H:
            out += h[:, None] * (p - _target(column, y, SUM, SHARE, SMOOTHING))
        out_at = out_ptr + row[:, None] * COLUMNS + column[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=there)
    else:
        # First ⟨p, v⟩ over all blocks, then the output, which needs it.
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            there = inside[:, None] & (column < COLUMNS)[None, :]
            x_at = x_ptr + row[:, None] * X_STRIDE + column[None, :]
            x = tl.load(x_at, mask=there, other=float("-inf")).to(SUM)
            v_at = v_ptr + row[:, None] * V_STRIDE + column[None, :]
            v = tl.load(v_at, mask=there, other=0.0).to(SUM)
            p = tl.exp((x - largest[:, None]) - log_total[:, None])
            mean += tl.sum(p * v, 1)
            plain += tl.sum(v, 1)
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            there = inside[:, None] & (column < COLUMNS)[None, :]
            x_at = x_ptr + row[:, None] * X_STRIDE + column[None, :]
            x = tl.load(x_at, mask=there, other=float("-inf")).to(SUM)
            v_at = v_ptr + row[:, None] * V_STRIDE + column[None, :]
            v = tl.load(v_at, mask=there, other=0.0).to(SUM)
            p = tl.exp((x - largest[:, None]) - log_total[:, None])
            out = g[:, None] * p * (v - mean[:, None])
            if HAS_H:
                out += h[:, None] * (p - _target(column, y, SUM, SHARE, SMOOTHING))
            out_at = out_ptr + row[:, None] * COLUMNS + column[None, :]
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=there)
    label_at = v_ptr + row * V_STRIDE + tl.where(known, y, 0)
    at_label = tl.load(label_at, mask=inside, other=0.0).to(SUM)
    along = mean - (1.0 - SMOOTHING) * at_label - SHARE * plain
    tl.store(along_ptr + row, tl.where(known, along, float("nan")), mask=inside)


@dataclass(frozen=True)
class Tile:
    """How rows are cut: rows per program, columns per block, and warps per program."""

    rows: int
    block: int
    warps: int


def tile(
    columns: int,
    sums: torch.dtype,
    *,
    second: bool = False,
    interpreted: bool = INTERPRETED,
) -> Tile:
    """The tile for rows of `columns` entries.

    Args:
        columns: C.
        sums: dtype of the sums. In float64 a tile has half as many entries, or registers spill.
        second: whether it is for the kernel of this name, which loads two tensors. A row is one
            block there, if registers hold it.
        interpreted: whether Triton's interpreter runs the kernels, whose cost follows the number of
            programs.
    """
    share = sums.itemsize // 4
    longest = WHOLE_ROW // share
    block = triton.next_power_of_2(columns)
    block = min(block, longest if second and block <= longest else 4096)
    # Some 2,048 entries per program and 16 loads per thread are enough in flight. A row is not cut
    # between programs.
    rows = max(1, 2048 // share // block)
    loads = 2 if second and columns <= block else 1  # a row in several blocks is loaded twice
    warps = min(16, max(1, rows * block * share * loads // 512))
    return Tile(rows=max(rows, 64) if interpreted else rows, block=block, warps=warps)


def forward(x: Tensor, y: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """CE of each row [B], and its maximum and log Σ exp(x − max) [B, 2]."""
    x = _row_major(x)
    rows, columns = x.shape
    sums = _sum_dtype(x)
    ce, stats = x.new_empty(rows, dtype=sums), x.new_empty(rows, 2, dtype=sums)
    cut = tile(columns, sums)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, cut.rows),)](
                x, y.contiguous(), ce, stats, rows, STRIDE=x.stride(0),
                **_constants(cut, sums, columns, smoothing),
            )  # fmt: skip
    return ce, stats


def gradient(x: Tensor, stats: Tensor, y: Tensor, g: Tensor, smoothing: float) -> Tensor:
    """g_b (p − t) for each row [B, C], in the dtype of x."""
    x = _row_major(x)
    rows, columns = x.shape
    out = x.new_empty(rows, columns)
    cut = tile(columns, stats.dtype)
    if rows:
        with torch.cuda.device_of(x):
            _gradient_kernel[(triton.cdiv(rows, cut.rows),)](
                x, stats.contiguous(), y.contiguous(), g.contiguous(), out, rows,
                STRIDE=x.stride(0), **_constants(cut, stats.dtype, columns, smoothing),
            )  # fmt: skip
    return out


def second(
    x: Tensor, stats: Tensor, y: Tensor, g: Tensor, v: Tensor, h: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(h_b (p − t) + g_b p ∘ (v − ⟨p, v⟩) [B, C] in the dtype of x, ⟨v, p − t⟩ [B]).

    Where h is None it counts as zero.
    """
    x, v = _row_major(x), _row_major(v)
    rows, columns = x.shape
    out, along = x.new_empty(rows, columns), stats.new_empty(rows)
    cut = tile(columns, stats.dtype, second=True)
    if rows:
        with torch.cuda.device_of(x):
            _second_kernel[(triton.cdiv(rows, cut.rows),)](
                x, stats.contiguous(), y.contiguous(), g.contiguous(), v,
                g if h is None else h.contiguous(), out, along, rows, X_STRIDE=x.stride(0),
                V_STRIDE=v.stride(0), HAS_H=h is not None,
                **_constants(cut, stats.dtype, columns, smoothing),
            )  # fmt: skip
    return out, along


def _row_major(x: Tensor) -> Tensor:
    """The same tensor with adjacent columns; rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _constants(cut: Tile, sums: torch.dtype, columns: int, smoothing: float) -> dict[str, Any]:
    """What a kernel is compiled for, beside its strides.

    The number of columns is one of them: only a known one lets Triton load several entries at once,
    but for multiples of 16. So is the smoothing: as an argument Triton would make it a float32.
    """
    return {
        "COLUMNS": columns,
        "ROWS": cut.rows,
        "BLOCK": cut.block,
        "SUM": tl.float64 if sums == torch.float64 else tl.float32,
        "SHARE": smoothing / columns,
        "SMOOTHING": smoothing,
        "num_warps": cut.warps,
    }
