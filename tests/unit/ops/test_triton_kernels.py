"""The Triton kernels as a GPU would get them: they are compiled, without one, and looked at.

What they compute is tried in test_class_weighted.py, in Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it comes with PyTorch)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lfmcw_app.ops import _triton  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}

OF_LOGITS = {"x_ptr", "v_ptr", "out_ptr"}

KERNELS = {
    _triton._forward_kernel: ("STRIDE",),
    _triton._gradient_kernel: ("STRIDE",),
    _triton._second_kernel: ("X_STRIDE", "V_STRIDE"),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a GPU would run.

    Attributes:
        loads: bytes of each load of logits by a thread.
        registers: of a thread.
        spilled: bytes that did not fit in registers.
    """

    loads: list[int]
    registers: int
    spilled: int


def compiled(kernel, columns, dtype, capability, folder):
    """Compiles a kernel for logits whose rows are adjacent, as a launch on a GPU would."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    second = kernel is _triton._second_kernel
    cut = _triton.tile(columns, sums, second=second, interpreted=False)
    constants = _triton._constants(cut, sums, columns, 0.1)
    constants |= dict.fromkeys(KERNELS[kernel], columns) | ({"HAS_H": True} if second else {})
    warps = constants.pop("num_warps")
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[dtype if name in OF_LOGITS else sums]
            aligned[(place,)] = [["tt.divisibility", 16]]  # as PyTorch allocates
        else:
            signature[name] = "i32"
    signature["y_ptr"] = "*i64"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    return inspected(ptx, folder)


def inspected(ptx, folder):
    """What the assembler makes of a kernel."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={architecture}", path]
    report = subprocess.run(
        [*command, "-o", folder / "kernel.cubin"], capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    loads = re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return Compiled(
        loads=[int(count or 1) * int(bits) // 8 for count, bits in loads],
        registers=int(re.search(r"Used (\d+) registers", report.stderr)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", report.stderr)[1]),
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("columns", [10, 100, 1000, 16_384, 100_000])
def test_registers_suffice_and_loads_are_wide(columns, dtype, capability, tmp_path):
    # A row of C entries begins at a multiple of C: the widest load that divides a row, at most 16
    # bytes, is the widest that is possible.
    row = columns * dtype.itemsize
    widest = next(size for size in (16, 8, 4) if row % size == 0)
    for kernel in KERNELS:
        found = compiled(kernel, columns, dtype, capability, tmp_path)
        assert found.spilled == 0, kernel.__name__
        assert max(found.loads) >= widest, kernel.__name__
        assert found.registers <= 128, kernel.__name__
