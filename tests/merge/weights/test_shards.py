"""One file or several with an index, as Hugging Face lays them out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipmerge.checkpoint.safetensors import read_header
from clipmerge.errors import OutputError
from clipmerge.weights.weights import Weights, load, mean

Point = Callable[..., Weights]


@pytest.fixture
def soup(point: Point) -> Weights:
    rng = np.random.default_rng(0)
    shapes = {"a": (10,), "b": (30,), "c": (5,), "d": (100,), "e": (1,)}
    return mean(
        [point(n, **{k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()}) for n in "pq"]
    )


def test_shards_hold_at_most_the_size_and_the_index_finds_everything(soup: Weights, tmp_path: Path) -> None:
    written = soup.save(tmp_path / "m.safetensors", shard_size=200)
    assert written.name == "m.safetensors.index.json"
    index = json.loads(written.read_text())
    shard = {i: f"m-{i:05}-of-00003.safetensors" for i in (1, 2, 3)}
    assert index["weight_map"] == {"a": shard[1], "b": shard[1], "c": shard[1], "d": shard[2], "e": shard[3]}
    assert index["metadata"]["total_size"] == 4 * 146
    sizes = [sum(t.nbytes for t in read_header(tmp_path / shard[i])[1].values()) for i in shard]
    assert sizes == [180, 400, 4]  # "d" alone is larger than a shard
    assert not (tmp_path / "m.safetensors").exists()


def test_shards_and_one_file_hold_the_same(soup: Weights, tmp_path: Path) -> None:
    from clipmerge.weights.digest import content_digest

    index = soup.save(tmp_path / "m.safetensors", shard_size=150)
    whole = soup.save(tmp_path / "whole.safetensors")
    assert content_digest(load(index).checkpoints[0]) == content_digest(load(whole).checkpoints[0])
    assert load(index).record["notation"] == "mean([p, q])"


def test_what_fits_one_shard_is_one_file(soup: Weights, tmp_path: Path) -> None:
    assert soup.save(tmp_path / "m.safetensors", shard_size=10_000) == tmp_path / "m.safetensors"


def test_nothing_is_written_where_one_of_the_files_is_there(soup: Weights, tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00003.safetensors").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"m-00002-of-00003\.safetensors already exists"):
        soup.save(tmp_path / "m.safetensors", shard_size=200)
    assert sorted(tmp_path.iterdir()) == before
