"""LFM-CW: learning from mistakes by class weighting, for differentiable architecture search."""
