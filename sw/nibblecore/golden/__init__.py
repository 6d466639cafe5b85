"""The golden model: executes programs instruction by instruction in numpy; the arbiter of truth for RTL and boards."""

from .model import GoldenCore, GoldenMemory

__all__ = ["GoldenCore", "GoldenMemory"]
