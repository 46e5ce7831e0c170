"""The Lightning module that owns a base model and its chain."""
