"""The DARTS search space: primitives, cells, supernet, architecture, genotype and derived network."""
