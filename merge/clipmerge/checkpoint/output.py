"""Write files and folders that appear whole or not at all.

Everything goes to a sibling first, `.NAME.01234567.clipmerge-tmp`, which takes its final name by a rename. The writer
holds a lock (flock) on the sibling for as long as it lives: the next run can tell what a killed run left behind, which
it removes, from what another run is writing, which it leaves alone.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from stat import S_ISDIR, S_ISREG

from clipmerge.errors import OutputError

SUFFIX = ".clipmerge-tmp"


def check_target(path: Path, *, force: bool, inputs: Collection[Path] = ()) -> Path:
    """Refuse a file that could not be written, before any work is done. Returns its real path, links followed.

    Raises:
        OutputError: it exists and `force` is not given, it is one of `inputs` (by any name or link), it is a
            folder, or its folder does not exist or cannot be written to.
    """
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r} is no name for a file", hint="take the NUL character out")
    with _explain(path):
        real = Path(os.path.realpath(path))
        try:
            mode = real.stat().st_mode  # asked once: another run may take the file away meanwhile
        except (FileNotFoundError, NotADirectoryError):
            mode = None
        if mode is not None and S_ISDIR(mode):
            raise OutputError(f"{path} is a folder", hint=f"name the file: -o {path / 'merged.safetensors'}")
        if not real.parent.is_dir():
            raise OutputError(f"the folder {real.parent} does not exist", hint=f"mkdir -p {real.parent}")
        if mode is not None and not S_ISREG(mode):
            raise OutputError(f"{path} is not a regular file", hint="write to a file of its own")
        if mode is not None and any(_same(source, real) for source in inputs):
            raise OutputError(
                f"{path} is also an input", hint="write to another name; inputs are never replaced"
            )
        if mode is not None and not force:
            raise OutputError(
                f"{path} already exists", hint="choose another name, or replace it with --force"
            )
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {real.parent} cannot be written to", hint="check its permissions")
    return real


def check_folder(folder: Path, names: Sequence[str], *, force: bool, inputs: Collection[Path] = ()) -> None:
    """Refuse a folder in which the files `names` could not be written, as `check_target` does for one file.

    Raises:
        OutputError: one of the files cannot be written, or there is no folder to make `folder` in.
    """
    if folder.is_dir():
        for name in names:
            check_target(folder / name, force=force, inputs=inputs)
    elif folder.exists():
        raise OutputError(f"{folder} is a file, not a folder", hint="name another folder")
    elif not folder.absolute().parent.is_dir():
        raise OutputError(f"the folder {folder.parent} does not exist", hint=f"mkdir -p {folder.parent}")


@contextmanager
def new_files(
    targets: Sequence[tuple[Path, int]], *, force: bool, fsync: bool = False, superseded: Sequence[Path] = ()
) -> Iterator[list[int]]:
    """Open siblings of the targets, with their space reserved, and rename them in order on leaving.

    Args:
        targets: each real path (see `check_target`) and its size in bytes. Of several, the last one is the
            index that names the others: an old one is taken away before the first of them is replaced, so
            that no index ever names a mixture of old and new files.
        force: whether an existing file may be replaced; without it the file that appeared meanwhile stays.
        fsync: wait until the bytes are on the disk before renaming: safe against power loss, and slow.
        superseded: older files of the same name in another shape, removed once the new ones are there.

    Yields:
        The file descriptors, for `write_at`.

    Raises:
        OutputError: no space, read-only, or the file appeared meanwhile. Nothing is left behind.
    """
    path, size = targets[0][0], sum(size for _, size in targets)
    with ExitStack() as stack:
        with _explain(path, size):
            siblings = [stack.enter_context(_new_sibling(target)) for target, _ in targets]
            for (target, count), (_, descriptor) in zip(targets, siblings, strict=True):
                _allocate(target, descriptor, count)
        yield [descriptor for _, descriptor in siblings]
        with _explain(path, size):
            pairs = [(sibling, target) for (sibling, _), (target, _) in zip(siblings, targets, strict=True)]
            _publish(
                pairs, force=force, superseded=superseded, sync=[d for _, d in siblings] if fsync else ()
            )


@contextmanager
def whole_file(
    path: Path, *, force: bool = True, fsync: bool = False, parents: bool = False
) -> Iterator[Path]:
    """Yield an empty sibling to write one file to, and rename it to `path` if the block ends without an error.

    Args:
        force: whether an existing file may be replaced.
        fsync: as in `new_files`.
        parents: make the file's folder where it is missing, as caches do.

    Raises:
        OutputError: it cannot be written; also for any OSError inside the block. Nothing is left behind.
    """
    hint = "make room, or choose another folder for caches with CLIPMERGE_CACHE" if parents else None
    with _explain(path, hint=hint):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        real = check_target(path, force=force)
        with _new_sibling(real) as (sibling, descriptor):
            yield sibling
            _publish([(sibling, real)], force=force, sync=[descriptor] if fsync else ())


@contextmanager
def whole_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a sibling folder to write into, which becomes `folder`, or whose files move into it, on leaving.

    Args:
        names: the files that will be written, in the order in which they replace older ones.

    Raises:
        OutputError: it cannot be written. Nothing is left behind.
    """
    with _explain(folder), _new_sibling(folder, folder=True) as (sibling, _):
        try:
            yield sibling
        except OutputError as error:  # speak of the place that was asked for
            raise OutputError(error.message.replace(str(sibling), str(folder)), hint=error.hint) from error
        if not folder.exists():
            sibling.rename(folder)
            return
        for name in names:
            (sibling / name).replace(folder / name)


def write_at(descriptor: int, content: "bytes | memoryview", offset: int, path: Path) -> None:
    """Write all of `content` at `offset`.

    Raises:
        OutputError: the disk is full or fails.
    """
    view = memoryview(content)
    with _explain(path, len(view)):
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


@contextmanager
def _new_sibling(target: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """Make an empty, locked sibling of `target`; remove it on leaving unless it was renamed."""
    name = target.name  # a long one is cut, and made distinct by its digest
    if len(os.fsencode(name)) > 120:
        name = f"{name[:20]}~{sha256(os.fsencode(name)).hexdigest()[:8]}"
    _clear_leftovers(target.parent, name)
    flags = os.O_RDONLY if folder else os.O_CREAT | os.O_EXCL | os.O_RDWR
    while True:
        sibling = target.with_name(f".{name}.{token_hex(4)}{SUFFIX}")
        if folder:
            sibling.mkdir()
        descriptor = os.open(sibling, flags | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a file system without locks: leftovers stay until removed by hand
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Before it was locked, another run may have taken it for a leftover. Then it is made again.
            if sibling.exists() and os.path.samestat(os.fstat(descriptor), sibling.stat()):
                yield sibling, descriptor
                return
        finally:
            os.close(descriptor)
            _remove(sibling)


def _clear_leftovers(folder: Path, name: str) -> None:
    """Remove the siblings of `name` whose writers are gone: nobody holds their lock."""
    ours = re.compile(re.escape(f".{name}.") + "[0-9a-f]{8}" + re.escape(SUFFIX), re.DOTALL)
    with suppress(OSError):  # a folder may be writable and not readable
        for path in folder.iterdir():
            if ours.fullmatch(path.name):
                _remove(path, only_if_unlocked=True)


def _remove(path: Path, only_if_unlocked: bool = False) -> None:
    with suppress(OSError), ExitStack() as stack:
        is_folder = path.is_dir() and not path.is_symlink()
        if only_if_unlocked:
            mode = os.O_RDONLY if is_folder else os.O_RDWR  # network file systems lock what may be written
            descriptor = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_folder:
            shutil.rmtree(path)
        else:
            path.unlink()


def _allocate(target: Path, descriptor: int, size: int) -> None:
    """Reserve the space, so that a disk that is too small is met before the work and not after it."""
    free = os.statvfs(target.parent)
    if size > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # ZFS and some network file systems
                raise
    os.ftruncate(descriptor, size)


def _publish(
    pairs: Sequence[tuple[Path, Path]],
    *,
    force: bool,
    superseded: Sequence[Path] = (),
    sync: Sequence[int] = (),
) -> None:
    """Rename each sibling to its target, all of them or (without `force`) none."""
    for descriptor in sync:
        os.fsync(descriptor)
    last = pairs[-1][1]
    folder = os.open(last.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(pairs) > 1 or superseded:
            with suppress(OSError):  # one run at a time, or two would each place half of the files
                fcntl.flock(folder, fcntl.LOCK_EX)
        if force and len(pairs) > 1:
            last.unlink(missing_ok=True)
        with ExitStack() as take_back:
            for sibling, target in pairs:
                _rename(sibling, target, force)
                if not force:
                    take_back.callback(target.unlink, missing_ok=True)
            take_back.pop_all()
        for old in superseded:
            old.unlink(missing_ok=True)
        if sync:
            os.fsync(folder)
    finally:
        os.close(folder)


def _rename(sibling: Path, target: Path, force: bool) -> None:
    if force:
        sibling.replace(target)
        return
    try:
        os.link(sibling, target)  # unlike rename, refuses to replace what appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        sibling.replace(target)


def _same(left: Path, right: Path) -> bool:
    with suppress(OSError):
        return left.samefile(right)
    return False


@contextmanager
def _explain(path: Path, size: int | None = None, hint: str | None = None) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what did not work, and what to do."""
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        advice = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "write to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space or write to another disk; nothing was left behind"
            if size is not None:
                what = f"needs {size / 1e6:,.1f} MB and does not fit: {error.strerror}"
        elif error.errno == errno.EEXIST:
            what, advice = "appeared while it was being written", "replace it with --force"
        raise OutputError(f"{path} {what}", hint=hint or advice) from error
