"""Where caches live. All of it may be deleted at any time."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """Return `$CLIPMERGE_CACHE`, or the platform's cache folder for clipmerge. It is not created here."""
    chosen = os.environ.get("CLIPMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("clipmerge", appauthor=False)
