"""What a merge holds in memory, whatever the size and number of its inputs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PutSparse = Callable[[Path, str, tuple[int, ...]], Path]
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def _watched(*arguments: object) -> dict[str, float]:
    """Run the command; the most that each line of /proc/PID/status reached, in MB."""
    words = [sys.executable, "-m", "clipmerge", *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    status = Path(f"/proc/{running.pid}/status")
    most = {"RssAnon": 0.0, "VmHWM": 0.0}
    while running.poll() is None:
        for line in status.read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in most:
                most[key] = max(most[key], int(rest.split()[0]) / 1000)
        time.sleep(0.005)
    _, errors = running.communicate()
    assert running.returncode == 0, errors
    return most


@LINUX
@pytest.mark.parametrize(
    ("dtype", "numel", "count"),
    [
        ("F32", 30_000_000, 3),
        pytest.param("F32", 100_000_000, 8, marks=pytest.mark.slow),
        pytest.param("F16", 200_000_000, 4, marks=pytest.mark.slow),
        pytest.param("F32", 600_000_001, 2, marks=pytest.mark.slow),  # more than 2 GiB in one tensor
    ],
)
def test_a_merge_of_large_files_stays_under_150_mb_of_its_own_and_300_mb_in_all(
    tmp_path: Path, put_sparse: PutSparse, dtype: str, numel: int, count: int
) -> None:
    inputs = [put_sparse(tmp_path / f"{i}.safetensors", dtype, (numel // 1000, 1000)) for i in range(count)]
    out = tmp_path / "out" / "soup.safetensors"
    out.parent.mkdir()
    most = _watched("soup", *inputs, "-o", out)
    assert out.stat().st_size > numel * {"F32": 4, "F16": 2}[dtype] * 0.99
    assert 0 < most["RssAnon"] < 150
    assert 0 < most["VmHWM"] < 300
