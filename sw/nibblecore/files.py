"""Files that are complete or not there, and where those that can be made again are kept."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, then rename: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_dir() -> Path:
    """Where builds and results of tools are kept.

    ``$NIBBLECORE_CACHE``, else ``$XDG_CACHE_HOME/nibblecore``, else ``~/.cache/nibblecore``.
    """
    if chosen := os.environ.get("NIBBLECORE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "nibblecore"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
