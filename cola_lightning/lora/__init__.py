"""Low-rank layers: what is added to a base layer, and how layers of a model come to have it."""
