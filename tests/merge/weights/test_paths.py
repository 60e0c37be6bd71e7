"""A path is taken wherever weights are."""

from collections.abc import Mapping
from pathlib import Path

import clipmerge as cm


def test_mean_and_interpolate_take_paths_weights_or_both(tiny_checkpoints: Mapping[str, Path]) -> None:
    paths = [tiny_checkpoints["ft0"], str(tiny_checkpoints["ft1"])]
    loaded = cm.load_all(paths)
    wanted = cm.mean(loaded).state_dict()
    for checkpoints in (paths, [paths[0], loaded[1]]):
        made = cm.mean(checkpoints).state_dict()
        assert all(made[name].equal(tensor) for name, tensor in wanted.items())
    half, again = cm.interpolate(*paths, 0.25).state_dict(), cm.interpolate(*loaded, 0.25).state_dict()
    assert all(half[name].equal(tensor) for name, tensor in again.items())
