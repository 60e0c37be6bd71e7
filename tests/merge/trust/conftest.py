"""Checkpoints written byte by byte, without the library that is tested, and programs of their own to try it in."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Entry = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, bytes."""
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


def _entry(value: Any) -> Entry:
    if isinstance(value, tuple):
        return value
    array = np.asarray(value)
    return _NAMES[array.dtype.name], array.shape, array.tobytes()


def _header(tensors: Mapping[str, Entry], sizes: Mapping[str, int]) -> bytes:
    at, entries = 0, {}
    for name, (dtype, shape, _) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture
def put() -> Callable[..., Path]:
    """Write a safetensors file: `put(path, name=array or (dtype, shape, bytes), …)`."""

    def write(path: Path, **tensors: Any) -> Path:
        entries = {name: _entry(value) for name, value in tensors.items()}
        head = _header(entries, {name: len(raw) for name, (_, _, raw) in entries.items()})
        path.write_bytes(head + b"".join(raw for _, _, raw in entries.values()))
        return path

    return write


@pytest.fixture
def put_sparse() -> Callable[[Path, str, tuple[int, ...]], Path]:
    """Write one tensor `w` of zeros that takes no room on the disk, however large it is."""

    def write(path: Path, dtype: str, shape: tuple[int, ...]) -> Path:
        nbytes = int(np.prod(shape)) * {"F32": 4, "F16": 2, "BF16": 2}[dtype]
        head = _header({"w": (dtype, shape, b"")}, {"w": nbytes})
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + nbytes)
        return path

    return write


@pytest.fixture
def stored() -> Callable[[Path], dict[str, Entry]]:
    """What a safetensors file holds, read by the letter of the format."""

    def read(path: Path) -> dict[str, Entry]:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {
            name: (
                e["dtype"],
                tuple(e["shape"]),
                data[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
            )
            for name, e in header.items()
        }

    return read


@pytest.fixture
def digest() -> Callable[[Path], str]:
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python program in a process of its own."""

    def run(code: str, *args: Any, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        words = [
            sys.executable,
            "-W",
            "error",
            "-c",
            code,
            *(os.fspath(a) if isinstance(a, Path) else str(a) for a in args),
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)

    return run


@pytest.fixture
def leftovers() -> Callable[[Path], list[str]]:
    return lambda folder: sorted(p.name for p in folder.iterdir() if p.name.endswith(".clipmerge-tmp"))
