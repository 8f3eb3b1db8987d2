"""LFM-CW: learning from mistakes based on class weighting, applied to differentiable architecture
search.
"""
