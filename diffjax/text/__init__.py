"""Frozen text encoders, their tokenizers and the cache of embeddings."""
