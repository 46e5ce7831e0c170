"""Chains: links, when they end, and how they are saved and loaded."""
