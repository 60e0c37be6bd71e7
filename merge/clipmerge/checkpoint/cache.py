"""Where caches live. Everything under it is keyed by content and may be deleted at any time."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """`$CLIPMERGE_CACHE`, or the platform's cache folder for clipmerge. Not created here."""
    chosen = os.environ.get("CLIPMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("clipmerge", appauthor=False)
