"""What is wrong with items, said all at once; and what identifies their content."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.images import Images, Picked
from clipmerge.errors import DataError, OutputError
from clipmerge.types import Progress

NAMED = 10
"""How many offending items an error names."""


@dataclass(frozen=True, slots=True)
class Bad:
    """An item, or a class, that cannot be used, and why."""

    item: str
    reason: str


def refuse(source: str, bad: Sequence[Bad]) -> None:
    """Nothing where `bad` is empty, else one DataError that counts them and names the first ten."""
    if not bad:
        return
    lines = [f"  {b.item}: {b.reason}" for b in bad[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"  … and {len(bad) - NAMED} more")
    count = "1 item" if len(bad) == 1 else f"{len(bad)} items"
    raise DataError(
        f"{source}: {count} cannot be used\n" + "\n".join(lines),
        hint="put them right, or leave them out with --skip-bad (skip_bad=True)",
    )


def unreadable(
    images: Images, names: Sequence[str], *, fully: bool, on_progress: Progress | None = None
) -> dict[int, Bad]:
    """The images that do not open: by their headers, or `fully`, by decoding every one.

    What was found is remembered: headers by the files' size and time, decoding by content.
    """
    headers = _remembered(
        "headers",
        _stamps(images),
        lambda: _problems(images.glance, len(images), "opening images", on_progress),
    )
    found = dict(headers)
    if fully:
        good = np.array([i for i in range(len(images)) if i not in headers], np.int64)
        rest = Picked(images, good)
        content = blake3(content_keys(rest).tobytes()).hexdigest()
        decoding = _remembered(
            "decoding", content, lambda: _problems(rest.image, len(rest), "checking images", on_progress)
        )
        found |= {int(good[i]): reason for i, reason in decoding.items()}
    return {i: Bad(names[i], found[i]) for i in sorted(found)}


def _problems(
    read: Callable[[int], object], count: int, what: str, on_progress: Progress | None
) -> dict[int, str]:
    """Number → why `read` raised."""

    def problem(i: int) -> str | None:
        try:
            read(i)
        except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
            return why_unreadable(error)
        return None

    found = {}
    with ThreadPoolExecutor(8) as pool:
        for i, reason in enumerate(pool.map(problem, range(count))):
            if reason is not None:
                found[i] = reason
            if on_progress is not None and (i % 256 == 255 or i + 1 == count):
                on_progress(what, i + 1, count)
    return found


def _remembered(kind: str, key: str | None, make: Callable[[], dict[int, str]]) -> dict[int, str]:
    """What `make` found, kept in the cache where there is a key to keep it by."""
    if key is None:
        return make()
    path = cache_dir() / kind / f"{key}.json"
    with suppress(OSError, ValueError, AttributeError):
        return {int(i): str(reason) for i, reason in json.loads(path.read_text("utf-8")).items()}
    found = make()
    with suppress(OutputError), whole_file(path, parents=True) as sibling:  # a full disk only costs time here
        sibling.write_text(json.dumps(found), "utf-8")
    return found


def why_unreadable(error: Exception) -> str:
    """A few words without a path: paths are the item's own name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return str(error) or type(error).__name__


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of which none occurs twice: the second "a.jpg" is "a.jpg (2)"."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(out)


def content_keys(images: Images) -> npt.NDArray[np.uint8]:
    """(n, 32) digests of the images' content, remembered for files by path, size and time.

    Raises:
        DataError: a file that was there is not there any more.
    """
    stamps = _stamps(images)
    path = None if stamps is None else cache_dir() / "keys" / f"{stamps}.keys"
    if path is not None:
        with suppress(OSError):
            raw = path.read_bytes()
            if len(raw) == 32 * (len(images) + 1) and blake3(raw[:-32]).digest() == raw[-32:]:
                return np.frombuffer(raw[:-32], np.uint8).reshape(-1, 32)
    try:
        with ThreadPoolExecutor(4) as pool:
            keys = b"".join(pool.map(images.key, range(len(images))))
    except OSError as error:
        raise DataError(
            f"an image cannot be read any more: {error}", hint="was it moved meanwhile?"
        ) from error
    if path is not None:
        with suppress(OutputError), whole_file(path, parents=True) as sibling:
            sibling.write_bytes(keys + blake3(keys).digest())
    return np.frombuffer(keys, np.uint8).reshape(-1, 32)


def _stamps(images: Images) -> str | None:
    """A digest of what files look like from outside, None where some images are in no file, or in none now."""
    hasher = blake3(b"clipmerge stamps 1")
    for i in range(len(images)):
        try:
            stamp = images.stamp(i)
        except OSError:
            return None
        if stamp is None:
            return None
        hasher.update(stamp.encode() + b"\n")
    return hasher.hexdigest()
