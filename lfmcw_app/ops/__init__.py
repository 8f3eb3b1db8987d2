"""Class-weighted losses."""

from lfmcw_app.ops.class_weighted import class_weighted_cross_entropy, classwise_cross_entropy

__all__ = ["class_weighted_cross_entropy", "classwise_cross_entropy"]
