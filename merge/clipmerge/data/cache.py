"""Where caches live, and how a file appears in one: whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from clipmerge.errors import OutputError


def cache_dir() -> Path:
    """`CLIPMERGE_CACHE` where it is set, else the platform's cache folder for clipmerge."""
    chosen = os.environ.get("CLIPMERGE_CACHE")
    if chosen:
        return Path(chosen)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("clipmerge"))


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
