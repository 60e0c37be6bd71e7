"""What a machine without a GPU says when it is asked for one; these run anywhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_scoring_on_a_gpu_that_is_not_there(tiny_spec: Any, val: Any) -> None:
    import clipmerge as cm
    from clipmerge.errors import DeviceError

    with pytest.raises(DeviceError, match="no CUDA device can be used here") as raised:
        cm.Evaluator({"val": val}, tiny_spec, device="cuda")
    assert "leave --device out" in str(raised.value.hint)


def test_training_on_a_gpu_that_is_not_there(
    tiny_spec: Any, train: Any, tiny_checkpoints: Any, tmp_path: Path
) -> None:
    import clipmerge as cm
    from clipmerge.errors import DeviceError

    base, out = cm.load(tiny_checkpoints["base"]), tmp_path / "ft.safetensors"
    with pytest.raises(DeviceError, match="no CUDA device can be used here"):
        cm.finetune(base, train, out=out, model=tiny_spec, device="cuda")
    assert not out.exists()


def test_the_command_says_so_in_one_sentence(tiny_model_file: Path, tiny_checkpoints: Any) -> None:
    command = [
        "evaluate",
        str(tiny_checkpoints["base"]),
        "--data",
        "digits#val",
        "--model",
        str(tiny_model_file),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "clipmerge", *command, "--device", "cuda"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stderr
    assert "no CUDA device can be used here" in done.stderr
    assert "bug" not in done.stderr
