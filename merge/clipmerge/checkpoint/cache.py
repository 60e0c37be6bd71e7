"""Where caches live, and how a file appears in one: whole, or not at all. All of it may be deleted at any time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from platformdirs import user_cache_path

from clipmerge.errors import OutputError


def cache_dir() -> Path:
    """`$CLIPMERGE_CACHE`, or the platform's cache folder for clipmerge. Not created here."""
    chosen = os.environ.get("CLIPMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("clipmerge", appauthor=False)


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
