"""Building blocks of the networks (Flax Linen)."""
