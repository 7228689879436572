"""State, step, optimizer, checkpoints and what a person sees of a run."""
