"""The DARTS, P-DARTS and PC-DARTS search spaces: primitives, cells, supernet, architecture,
genotype and derived network.
"""
