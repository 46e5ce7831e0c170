"""Low-rank layers, and their injection into a model."""
