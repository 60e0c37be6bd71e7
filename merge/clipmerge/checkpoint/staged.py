"""Folders that appear whole or not at all: written beside their place under a name of their own, then moved there."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from clipmerge.checkpoint.temporary import SUFFIX
from clipmerge.checkpoint.write import check_target
from clipmerge.errors import OutputError


def check_folder(folder: Path, names: Sequence[str], *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a folder that could not be written, before any work is done.

    Args:
        names: the files that will be written into it.
        force: whether those may be replaced.
        inputs: files that never are.

    Raises:
        OutputError: one of the files exists or is an input, or there is no folder to make it in.
    """
    if folder.is_dir():
        for name in names:
            check_target(folder / name, force=force, inputs=inputs)
    elif folder.exists():
        raise OutputError(f"{folder} is a file, not a folder", hint="name another folder")
    elif not folder.absolute().parent.is_dir():
        raise OutputError(f"the folder {folder.parent} does not exist", hint=f"mkdir -p {folder.parent}")


@contextmanager
def staged(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A sibling folder to write into, which becomes `folder` (or whose files move into it) on leaving.

    Args:
        names: the files that will be written, in the order in which they replace older ones.

    Raises:
        OutputError: it cannot be written. Nothing is left behind.
    """
    _clear(folder)
    stage = folder.with_name(f".{folder.name}.{token_hex(4)}{SUFFIX}")
    try:
        stage.mkdir()
        lock = os.open(stage, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield stage
        if not folder.exists():
            stage.rename(folder)
            return
        for name in names:
            (stage / name).replace(folder / name)
    except OutputError as error:  # tell of the place that was asked for
        raise OutputError(error.message.replace(str(stage), str(folder)), hint=error.hint) from error
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", hint="nothing was left behind"
        ) from error
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what runs that were killed left behind: stages whose lock nobody holds."""
    for stage in folder.parent.glob("." + "*" + SUFFIX):
        if not stage.name.startswith(f".{folder.name}.") or not stage.is_dir():
            continue
        with suppress(OSError):
            descriptor = os.open(stage, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage)
            finally:
                os.close(descriptor)
