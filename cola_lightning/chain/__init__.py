"""Chains: links, when they end, and how they are saved and loaded."""

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.chain import Chain, Link

__all__ = ["BaseIdentity", "Chain", "Link"]
