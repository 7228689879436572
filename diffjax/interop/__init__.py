"""Public checkpoint formats, in and out."""
