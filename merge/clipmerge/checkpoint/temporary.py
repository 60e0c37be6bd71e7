"""Unfinished files: beside their target, locked by their writer, removed by the next run once it is gone."""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

SUFFIX = ".clipmerge-tmp"
"""Ends the name of every unfinished file, `.TARGET.01234567.clipmerge-tmp`."""


def clear_leftovers(target: Path) -> list[Path]:
    """Remove unfinished files of `target` whose writers are gone (nobody holds their lock); what was removed."""
    ours = re.compile(re.escape(_stem(target)) + "[0-9a-f]{8}" + re.escape(SUFFIX), re.DOTALL)
    removed: list[Path] = []
    with suppress(OSError):  # a folder may be writable and not readable
        for path in target.parent.iterdir():
            if ours.fullmatch(path.name) and _abandoned(path):
                removed.append(path)
    return removed


def _abandoned(path: Path) -> bool:
    """Remove the file unless somebody holds its lock; whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _stem(target: Path) -> str:
    """How the names of `target`'s temporary files begin; a long name is cut and made distinct by its digest."""
    try:
        longest = os.pathconf(target.parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    room = longest - len("..01234567") - len(SUFFIX)
    name = os.fsencode(target.name)
    if len(name) > room:
        digest = sha256(name).hexdigest()[:8]
        name = name[: room - 9].decode(errors="ignore").encode() + f"~{digest}".encode()
    return f".{os.fsdecode(name)}."


def reserve(target: Path, size: int) -> tuple[Path, int]:
    """A new sibling file of `size` bytes, locked for as long as its descriptor is open."""
    free = os.statvfs(target.parent)
    if size > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    while True:
        temporary = target.with_name(f"{_stem(target)}{secrets.token_hex(4)}{SUFFIX}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # file systems without locks: leftovers stay there until removed by hand
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, temporary):  # another run cleared it before it was locked
                os.close(descriptor)
                continue
            _allocate(descriptor, size)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            os.close(descriptor)
            raise
        return temporary, descriptor


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the folder's lock, where the file system has one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _allocate(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # ZFS and some network file systems
                raise
    os.ftruncate(descriptor, size)
