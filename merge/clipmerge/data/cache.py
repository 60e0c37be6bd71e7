"""How a file appears in a cache: whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.errors import OutputError

__all__ = ["cache_dir", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A sibling to write to, renamed to `path` when the block ends well and removed when it does not.

    Writers of the same path do not meet: each has a sibling of its own, and the last rename wins.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    sibling = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield sibling
        sibling.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="make room, or choose another folder for caches with CLIPMERGE_CACHE",
        ) from error
    finally:
        with suppress(OSError):
            sibling.unlink(missing_ok=True)
