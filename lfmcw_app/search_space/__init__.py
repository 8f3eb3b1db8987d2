"""The DARTS, P-DARTS and PC-DARTS search spaces, from primitives to derived networks."""
