"""Whole networks, one file per family."""
