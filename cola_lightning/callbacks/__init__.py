"""Callbacks: knots, checkpoints, predictions, and those of the command line."""
