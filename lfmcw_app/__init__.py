"""LFM-CW: learning from mistakes based on class weighting, applied to differentiable architecture search."""

import os

# Threads of PyTorch that wait for one another spin by default; where other work wants the cores, a round of a small search then
# takes several times as long (docs/troubleshooting.md). Read when PyTorch is loaded, so it stands before all other imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
