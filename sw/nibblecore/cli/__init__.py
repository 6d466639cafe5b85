"""The command ``nibblecore``.

Errors that a user can mend are sentences on stderr and exit status 1; wrong usage exits with 2, an error of our own
with 70. Tracebacks appear with ``--debug`` only.
"""

from .app import main

__all__ = ["main"]
