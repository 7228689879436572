"""Pictures to look at and numbers to compare."""
