"""Read lists that users write: class names and prompt templates."""

import json
import re
from pathlib import Path
from typing import Any

from clipmerge.errors import DataError

__all__ = ["read_list"]


def read_list(path: Path, what: str, hint: str) -> Any:
    """Return the lines of a text file, or what a JSON file holds.

    Raises:
        DataError: it cannot be read, or begins like JSON and is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{what} cannot be read from {path}: {reason}", hint=hint) from error
    if re.match(r'\s*(\[|\{\s*")', text):  # a template may begin with "{}"
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}", hint=hint) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
