"""How a host reaches a core: one interface, several ways."""

from .base import Transport
from .golden import GoldenTransport

__all__ = ["GoldenTransport", "Transport"]
