"""diffjax: train, sample and compare image diffusion models with JAX."""

__version__ = "0.1.0"
