"""Files that appear whole or not at all, and the safetensors header that goes in front."""

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from clipmerge.checkpoint.temporary import clear_leftovers, locked_folder, reserve
from clipmerge.checkpoint.tensors import ITEMSIZE, Tensor
from clipmerge.errors import OutputError


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header for these tensors, each tensor's offset in the file, and the file's size.

    Widest elements first, then by name: every tensor is aligned, and the order is a function of the content.

    Raises:
        OutputError: a name holds half a surrogate pair, which no file of this format can hold.
    """
    order = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at, begins = 0, {}
    for name in order:
        tensor = tensors[name]
        begins[name] = at
        at += tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], at],
        }
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"a name or text is not Unicode and cannot be stored: {error.object[error.start - 20 : error.end]!r}",
            hint="rename that tensor, or take that text out of the metadata",
        ) from None
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, offsets, start + at


def check_target(path: Path, *, force: bool, inputs: Collection[Path] = ()) -> Path:
    """The path that will really be written (links followed), refused before any work is done.

    Raises:
        OutputError: it exists and `force` is not given, it is one of `inputs` (by any name or link), it is a
            folder, or its folder does not exist or cannot be written to.
    """
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r} is no name for a file", hint="take the NUL character out")
    with _explained([(path, 0)]):
        real = Path(os.path.realpath(path))
        mode = _mode(real)  # asked once: another run may take the file away meanwhile
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


def _mode(path: Path) -> int | None:
    """Its kind and permissions, None where there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _same(left: Path, right: Path) -> bool:
    with suppress(OSError):
        return left.samefile(right)
    return False


@contextmanager
def new_files(
    targets: Sequence[tuple[Path, int]], *, force: bool, fsync: bool = False, superseded: Sequence[Path] = ()
) -> Iterator[list[int]]:
    """File descriptors of sibling temporary files with their space reserved; renamed in order on leaving.

    Args:
        targets: each real path (see `check_target`) and its size in bytes. Of several, the last one is the
            index that names the others: an old one is taken away before the first of them is replaced, so
            that no index ever names a mixture of old and new files.
        force: whether an existing file may be replaced; without it the file that appeared meanwhile stays.
        fsync: wait until the bytes are on the disk before renaming: safe against power loss, and slow.
        superseded: older files of the same name in another shape, removed once the new ones are there.

    Raises:
        OutputError: no space, read-only, or the file appeared meanwhile. Nothing is left behind.
    """
    temporaries: list[tuple[Path, int]] = []
    try:
        with _explained(targets):
            for target, size in targets:
                clear_leftovers(target)
                temporaries.append(reserve(target, size))
        yield [descriptor for _, descriptor in temporaries]
        with _explained(targets):
            if fsync:
                for _, descriptor in temporaries:
                    os.fsync(descriptor)
            _publish([made for made, _ in temporaries], [path for path, _ in targets], superseded, force)
            if fsync:
                _sync_folder(targets[0][0].parent)
    finally:
        for temporary, descriptor in temporaries:
            os.close(descriptor)
            with suppress(OSError):
                temporary.unlink()


def write_bytes(path: Path, content: bytes, *, force: bool = False, fsync: bool = False) -> None:
    """A small file, whole or not at all.

    Raises:
        OutputError: it exists and `force` is not given, or it cannot be written.
    """
    real = check_target(path, force=force)
    with new_files([(real, len(content))], force=force, fsync=fsync) as (descriptor,):
        write_at(descriptor, content, 0, real)


def write_at(descriptor: int, content: "bytes | memoryview", offset: int, path: Path) -> None:
    """All of `content` at `offset`.

    Raises:
        OutputError: the disk is full or fails.
    """
    view = memoryview(content)
    with _explained([(path, len(view))]):
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


def _publish(
    temporaries: Sequence[Path], targets: Sequence[Path], superseded: Sequence[Path], force: bool
) -> None:
    if len(targets) == 1 and not superseded:
        _place(temporaries, targets, force)
        return
    with locked_folder(targets[-1].parent):  # or two runs would each place half of the files
        if force and len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        _place(temporaries, targets, force)
        for old in superseded:
            old.unlink(missing_ok=True)


def _place(temporaries: Sequence[Path], targets: Sequence[Path], force: bool) -> None:
    placed: list[Path] = []
    try:
        for temporary, target in zip(temporaries, targets, strict=True):
            _rename(temporary, target, force)
            placed.append(target)
    except BaseException:
        for target in placed if not force else ():
            target.unlink(missing_ok=True)
        raise


def _rename(temporary: Path, target: Path, force: bool) -> None:
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike rename, refuses to replace what appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        temporary.replace(target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(targets: Sequence[tuple[Path, int]]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path, size = targets[0][0], sum(size for _, size in targets)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{path} needs {size / 1e6:,.1f} MB and does not fit: {error.strerror}",
                hint="free some space or write to another disk; nothing was left behind",
            ) from error
        if error.errno == errno.EEXIST:
            raise OutputError(
                f"{path} appeared while it was being written", hint="replace it with --force"
            ) from error
        hint = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "write to another folder"
        raise OutputError(f"{path} cannot be written: {error.strerror}", hint=hint) from error
