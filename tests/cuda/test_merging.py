"""Matrices that are decomposed on a GPU against those that the CPU decomposes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import limited_memory

pytestmark = pytest.mark.cuda

EXPRESSIONS = {
    "tsv": "zs + tsv([a - zs, b - zs, c - zs])",
    "tsv, one twice": "zs + tsv([a - zs, b - zs, a - zs])",
    "tsv, fused": "zs + tsv([a - zs, b - zs], fused=True)",
    "tsv in the core space": 'zs + tsv([a - zs, b - zs], space="core")',
    "ties in KnOTS' space": 'zs + ties([a - zs, b - zs], space="knots")',
    "iso_c": "zs + 0.5*iso_c([a - zs, b - zs, c - zs])",
    "iso_cts": "zs + 0.5*iso_cts([a - zs, b - zs, c - zs])",
    "gram": "zs + gram([a - zs, b - zs, c - zs])",
    "wudi": 'zs + gram([a - zs, b - zs], weights="norm", ridge=1e-8)',
    "ace": "zs + ace([a - zs, b - zs, c - zs])",
    "svc of tsv": "zs + svc([a - zs, b - zs], merged=tsv([a - zs, b - zs]), alpha=1)",
    "svc of iso_c": "zs + svc([a - zs, b - zs], merged=iso_c([a - zs, b - zs]))",
    "cart": "cart([a, b, c])",
}


@pytest.fixture(scope="module")
def parsed(tiny_checkpoints: Any) -> Callable[[str], Any]:
    from clipmerge import load
    from clipmerge.weights.parse import names_in, parse

    names = {"zs": "base", "a": "ft0", "b": "ft1", "c": "ft2"}
    leaves = {name: load(tiny_checkpoints[key], name) for name, key in names.items()}
    return lambda text: parse(text, {name: leaves[name] for name in names_in(text) & leaves.keys()})


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("text", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_a_gpu_gives_what_the_cpu_gives(text: str, parsed: Callable[[str], Any], device: str) -> None:
    merged, zs = parsed(text), parsed("zs").state_dict("F64")
    ours, theirs = (merged.state_dict("F64", device=place) for place in (device, "cpu"))
    changed = max(farthest(theirs, zs), 1e-12)
    assert (
        farthest(ours, theirs) < 1e-6 * changed
    )  # a polar factor is known so well where it is hardly defined


def test_what_a_gpu_wrote_is_verified_by_a_cpu_and_the_other_way_round(
    parsed: Callable[[str], Any], tmp_path: Path, tiny_checkpoints: Any, device: str
) -> None:
    from clipmerge import verify

    parents = Path(tiny_checkpoints["base"]).parent
    for wrote, looks in ((device, "cpu"), ("cpu", device), (device, device)):
        out = parsed(EXPRESSIONS["tsv"]).save(tmp_path / "out.safetensors", device=wrote, force=True)
        verdict = verify(out, parents, device=looks)
        assert verdict.status == "verified", verdict.reason
        assert not (wrote == looks and verdict.rounded)


def test_a_gpu_gives_the_same_bytes_every_time(
    parsed: Callable[[str], Any], tmp_path: Path, device: str
) -> None:
    merged = parsed(EXPRESSIONS["tsv"])
    files = [
        merged.save(tmp_path / f"{threads}-{run}.safetensors", device=device, threads=threads).read_bytes()
        for threads in (1, 4)
        for run in range(3)
    ]
    assert len(set(files)) == 1


def test_a_models_own_device_is_used(parsed: Callable[[str], Any], tiny_spec: Any, device: str) -> None:
    import torch

    from clipmerge.model import build_model

    merged = parsed(EXPRESSIONS["iso_c"])
    module, expected = build_model(tiny_spec, torch.device(device)), merged.state_dict(device=device)
    merged.load_into(module)
    state = module.state_dict()
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in expected.items())


@pytest.mark.cuda(only=True)
def test_the_matrices_were_on_the_gpu(parsed: Callable[[str], Any]) -> None:
    import torch

    for place, used in (("cpu", False), ("cuda", True), (None, True)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        parsed(EXPRESSIONS["gram"]).state_dict(device=place)
        assert (torch.cuda.max_memory_allocated() > before) == used, place


@pytest.mark.cuda(only=True)
def test_too_little_memory_says_what_to_do() -> None:
    import torch

    import clipmerge as cm
    from clipmerge.errors import DeviceError

    rng = np.random.default_rng(0)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    tensors = [
        cm.from_state_dict({name: torch.from_numpy(rng.standard_normal((4096, 1024)).astype("f4"))})
        for _ in range(3)
    ]
    merged = tensors[0] + cm.iso_c([other - tensors[0] for other in tensors[1:]])
    with limited_memory(1 << 20), pytest.raises(DeviceError, match="ran out of memory") as refused:
        merged.state_dict(device="cuda")
    assert "--device cpu" in str(refused.value.hint)
