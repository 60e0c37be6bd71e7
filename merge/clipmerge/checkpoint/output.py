"""Write files and folders that appear whole or not at all.

Everything goes to a sibling first, `.NAME.01234567.clipmerge-tmp`, which takes its final name by a rename.
"""

import errno
import fcntl
import filecmp
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from stat import S_ISDIR, S_ISREG

from clipmerge.errors import OutputError
from clipmerge.types import Bytes

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
    _check_access(real.parent)
    return real


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OutputError: it cannot be made or written to, or is a file.
    """
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise OutputError(f"{place} is a file, not a folder", hint="name another folder")
            _check_access(place)
            break
    with _explain(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _check_access(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} cannot be written to", hint="check its permissions")


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
        force: whether an existing file may be replaced; without it a file that is there stays, which is an error
            unless it holds the same bytes.
        fsync: wait until the bytes are on the disk before renaming: safe against power loss, and slow.
        superseded: older files of the same name in another shape, removed once the new ones are there.

    Yields:
        The file descriptors, for `write_at`.

    Raises:
        OutputError: no space, read-only, or another file is there. Nothing is left behind.
    """
    path, size = targets[0][0], sum(size for _, size in targets)
    with ExitStack() as stack:
        with _explain(path, size):
            siblings = stack.enter_context(_siblings([target for target, _ in targets]))
            for (target, count), descriptor in zip(targets, siblings.values(), strict=True):
                _allocate(target, descriptor, count)
        yield list(siblings.values())
        with _explain(path, size):
            _publish(siblings, [target for target, _ in targets], force, fsync, superseded)


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
        with _siblings([real]) as siblings:
            yield next(iter(siblings))
            _publish(siblings, [real], force, fsync)


@contextmanager
def whole_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a sibling folder to write into, which becomes `folder`, or whose files move into it, on leaving.

    Args:
        names: the files that will be written, in the order in which they replace older ones.

    Raises:
        OutputError: it cannot be written. Nothing is left behind.
    """
    with _explain(folder), _siblings([folder], folders=True) as siblings:
        (sibling,) = siblings
        try:
            yield sibling
        except OutputError as error:  # speak of the place that was asked for
            raise OutputError(error.message.replace(str(sibling), str(folder)), hint=error.hint) from error
        if not folder.exists():
            sibling.rename(folder)
            return
        for name in names:
            (sibling / name).replace(folder / name)


def write_at(descriptor: int, path: Path, offset: int, content: "bytes | Bytes") -> None:
    """Write all of `content` at `offset`.

    Raises:
        OutputError: the disk is full or fails.
    """
    view = memoryview(content)  # type: ignore[arg-type]
    with _explain(path, len(view)):
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


@contextmanager
def _siblings(targets: Sequence[Path], folders: bool = False) -> Iterator[dict[Path, int]]:
    """Make an empty, locked sibling of each target, open by its descriptor; remove them on leaving unless renamed."""
    flags = os.O_RDONLY if folders else os.O_CREAT | os.O_EXCL | os.O_RDWR
    noted: list[Path] = []
    siblings: dict[Path, int] = {}
    try:
        for target in targets:
            name = target.name  # a long one is cut, and made distinct by its digest
            if len(os.fsencode(name)) > 120:
                name = f"{name[:20]}~{sha256(os.fsencode(name)).hexdigest()[:8]}"
            _clear_leftovers(target.parent, name)
            # The protocol: a writer holds a lock (flock) on its sibling for as long as it lives, also when it is
            # killed. So whoever comes next can tell what a dead run left, whose lock is free, from what a live one
            # is writing. Between its making and its locking a sibling looks dead, and another run may take it
            # away: it is made again then.
            while True:
                sibling = target.with_name(f".{name}.{token_hex(4)}{SUFFIX}")
                noted.append(
                    sibling
                )  # before it is made: Ctrl-C may arrive at any moment, also right after that
                if folders:
                    sibling.mkdir()
                descriptor = os.open(sibling, flags | os.O_CLOEXEC, 0o666)
                with suppress(OSError):  # a file system without locks: leftovers stay until removed by hand
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if sibling.exists() and os.path.samestat(os.fstat(descriptor), sibling.stat()):
                    siblings[sibling] = descriptor
                    break
                os.close(descriptor)
        yield siblings
    finally:
        for path in noted:
            _remove(path)
        for descriptor in siblings.values():
            os.close(descriptor)


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
    siblings: Mapping[Path, int],
    targets: Sequence[Path],
    force: bool,
    fsync: bool,
    superseded: Sequence[Path] = (),
) -> None:
    """Rename each sibling to its target, all of them or (without `force`) none."""
    for descriptor in siblings.values() if fsync else ():
        os.fsync(descriptor)
    folder = os.open(targets[-1].parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(targets) > 1 or superseded:
            with suppress(OSError):  # one run at a time, or two would each place half of the files
                fcntl.flock(folder, fcntl.LOCK_EX)
        if force and len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        with ExitStack() as take_back:
            for sibling, target in zip(siblings, targets, strict=True):
                if _rename(sibling, target, force) and not force:
                    take_back.callback(target.unlink, missing_ok=True)
            take_back.pop_all()
        for old in superseded:
            old.unlink(missing_ok=True)
        if fsync:
            os.fsync(folder)
    finally:
        os.close(folder)


def _rename(sibling: Path, target: Path, force: bool) -> bool:
    """Give the sibling its final name. Returns False where the very bytes stood there already, without `force`."""
    if force:
        sibling.replace(target)
        return True
    try:
        os.link(sibling, target)  # unlike rename, refuses to replace what is there
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not target.exists():
            sibling.replace(target)
            return True
    else:
        return True
    if not filecmp.cmp(sibling, target, shallow=False):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    return False


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
            what = "exists and holds something else"
            advice = "choose another name, or replace it with --force"
        raise OutputError(f"{path} {what}", hint=hint or advice) from error
