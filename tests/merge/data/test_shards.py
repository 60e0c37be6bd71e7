"""WebDataset shards as people have them: ranges, several, compressed, keys that restart, labels in words."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipmerge.data.open import open_split
from clipmerge.data.raw_split import expand
from clipmerge.errors import DataError

from .conftest import encoded, picture, shard


def members(start: int, labels: list[str], first_key: int = 0) -> list[tuple[str, bytes]]:
    """Pictures `start`, `start` + 1 … with these labels, under keys that count from `first_key`."""
    pairs = [
        (f"{first_key + i:04d}", encoded(picture(start + i, 8, 6), "PNG"), c) for i, c in enumerate(labels)
    ]
    return [m for key, data, label in pairs for m in ((f"{key}.png", data), (f"{key}.cls", label.encode()))]


@pytest.fixture
def restarting(tmp_path: Path) -> Path:
    """Three shards whose keys all start at 0000."""
    for i in range(3):
        shard(tmp_path / "w" / "test" / f"{i:02d}.tar", members(10 * i, ["0", "1"]))
    (tmp_path / "w" / "classnames.txt").write_text("cat\nsea lion\n")
    return tmp_path / "w"


def test_keys_that_restart_in_every_shard_lose_no_image(restarting: Path) -> None:
    split = open_split(restarting)
    assert split.names == ("00/0000", "00/0001", "01/0000", "01/0001", "02/0000", "02/0001")
    assert split.labels.tolist() == [0, 1] * 3
    for i in range(6):
        assert split.read_bytes(i) == encoded(picture(10 * (i // 2) + i % 2, 8, 6), "PNG")


@pytest.mark.parametrize(
    ("place", "shards"),
    [
        ("test/{00..02}.tar", "012"),
        ("test/{00..01}.tar", "01"),
        ("test/{00,02}.tar", "02"),
        ("test/00.tar::ROOT/test/02.tar", "02"),
        ("test/{00..01}.tar::ROOT/test/02.tar", "012"),
        ("{test,test}/01.tar", "11"),
    ],
)
def test_ranges_and_several(restarting: Path, place: str, shards: str) -> None:
    split = open_split(f"{restarting}/{place.replace('ROOT', str(restarting))}")
    expected = [encoded(picture(10 * int(i) + k, 8, 6), "PNG") for i in shards for k in range(2)]
    assert [split.read_bytes(i) for i in range(len(split))] == expected
    assert split.classes == ("cat", "sea lion"), "names lie beside the folder of the first"
    assert len(set(split.names)) == len(split)


def test_numbers_behind_a_part_name_no_part_of_their_own(tmp_path: Path) -> None:
    for i in range(2):
        shard(tmp_path / f"train{i}.tar", members(10 * i, ["cat", "dog"]))
        shard(tmp_path / f"val-{i}.tar", members(50 + i, ["cat"]))
    assert len(open_split(tmp_path, role="train")) == 4
    assert len(open_split(tmp_path, role="val")) == 2


def test_a_range_of_parquet_files(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i in range(3):
        rows = {
            "image": [{"bytes": encoded(picture(i), "PNG"), "path": None}],
            "label": ["cat" if i else "dog"],
        }
        pq.write_table(pa.table(rows), tmp_path / f"train-{i:05d}-of-00003.parquet")
    assert len(open_split(f"{tmp_path}/train-{{00000..00002}}-of-00003.parquet")) == 3


def test_ranges_as_braceexpand_writes_them() -> None:
    assert [str(p) for p in expand("a{8..11}.tar")] == ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]
    assert [str(p) for p in expand("{a,b}{01..02}")] == ["a01", "a02", "b01", "b02"]
    assert [str(p) for p in expand("plain{x}.tar")] == ["plain{x}.tar"]
    with pytest.raises(DataError, match="more than 100000 files"):
        expand("{0..999999999999}.tar")


def test_shards_that_are_not_there_are_named(restarting: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 5 files are not there: .*03\.tar, .*04\.tar") as caught:
        open_split(f"{restarting}/test/{{00..04}}.tar")
    assert "{0000..0099}" in str(caught.value.hint)
    with pytest.raises(DataError, match="1 of 2 files are not there: https:"):
        open_split(f"{restarting}/test/00.tar::https://example.org/01.tar")


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_compressed_shards_hold_the_same_split(restarting: Path, form: str) -> None:
    plain, packed = open_split(restarting), restarting.parent / form
    (packed / "test").mkdir(parents=True)
    for i in range(3):
        shard(packed / "test" / f"{i:02d}.tar.{form}", members(10 * i, ["0", "1"]), f"w:{form}")
    (packed / "classnames.txt").write_text("cat\nsea lion\n")
    split = open_split(packed)
    assert split.digest == plain.digest
    assert split.names == plain.names
    assert open_split(f"{packed}/test/{{00..02}}.tar.{form}").digest == plain.digest


def test_a_tgz_and_a_tar_that_is_compressed_all_the_same(tmp_path: Path) -> None:
    for name in ("a.tgz", "a.tar"):
        shard(tmp_path / name, members(0, ["cat", "dog"]), "w:gz")
        assert open_split(tmp_path / name).classes == ("cat", "dog")


def test_a_compressed_shard_that_is_cut_off(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar.gz", members(0, ["cat", "dog"]), "w:gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.tar\.gz cannot be read as a \.tar"):
        open_split(path)


@pytest.mark.parametrize("words", [["sea lion", "cat"], ["sea_lion", "Cat"]])
def test_words_in_cls_beside_names(tmp_path: Path, words: list[str]) -> None:
    shard(tmp_path / "test" / "0.tar", members(0, [*words, words[0]]))
    (tmp_path / "classnames.txt").write_text("cat\nsea lion\n")
    split = open_split(tmp_path)
    assert (split.classes, split.labels.tolist()) == (("cat", "sea lion"), [1, 0, 1])


def test_words_in_cls_that_no_name_has(tmp_path: Path) -> None:
    shard(tmp_path / "test" / "0.tar", members(0, ["sea lion", "cat", "dgo"]))
    (tmp_path / "classnames.txt").write_text("cat\nsea lion\ndog\n")
    with pytest.raises(DataError) as caught:
        open_split(tmp_path)
    assert "class 'dgo': not among the class names (did you mean dog?)" in caught.value.message
    assert open_split(tmp_path, skip_bad=True).labels.tolist() == [1, 0]


def test_nothing_under_a_key_is_lost_in_silence(tmp_path: Path) -> None:
    image = encoded(picture(0, 8, 6), "PNG")
    parts = [
        ("photo.001.png", image), ("photo.001.cls", b"cat"), ("photo.002.png", image), ("photo.002.cls", b"dog"),
        ("s.0.png", image), ("s.cls", b"cat"), ("t.png", image), ("t.mask.png", image), ("t.cls", b"dog"),
        ("gone.cls", b"cat"), ("u.gif", encoded(picture(1), "GIF")), ("u.cls", b"dog"), ("t.json", b"{}"),
        ("a/0.png", image), ("a/0.cls", b"cat"), ("b/0.png", image), ("b/0.cls", b"dog"),
    ]  # fmt: skip
    path = shard(tmp_path / "0.tar", parts)
    with pytest.raises(DataError) as caught:
        open_split(path)
    assert caught.value.message.splitlines()[1:] == ["  gone: no image beside its .cls"]
    split = open_split(path, skip_bad=True)
    assert sorted(split.names) == ["a/0", "b/0", "photo.001", "photo.002", "s.0", "t", "u"]
    assert len(split.duplicates) == 5


def test_a_key_that_comes_again_in_its_shard_is_another_image(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [*members(0, ["cat", "dog"]), *members(5, ["cat", "cat"])])
    split = open_split(path)
    assert split.names == ("0000", "0000 (2)", "0001", "0001 (2)")
    assert [split.classes[i] for i in split.labels] == ["cat", "cat", "dog", "cat"]
    assert split.read_bytes(1) == encoded(picture(5, 8, 6), "PNG")


def test_links_and_images_that_are_cut_off_are_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", members(0, ["cat", "dog"]))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="l: a link, which is not followed"):
        open_split(path)
    whole = shard(tmp_path / "1.tar", members(0, ["cat", "dog"])).read_bytes()
    start = whole.index(encoded(picture(1, 8, 6), "PNG"))
    (tmp_path / "1.tar").write_bytes(whole[: start + 10])
    with pytest.raises(DataError, match=r"cut off inside it|cannot be read"):
        open_split(tmp_path / "1.tar")


def test_captions_one_per_line_are_kept_together_when_held_out(tmp_path: Path) -> None:
    image = [encoded(picture(i, 8, 6), "PNG") for i in range(20)]
    parts = [
        m
        for i in range(20)
        for m in ((f"{i:02d}.png", image[i]), (f"{i:02d}.txt", f"one {i}\n\ntwo {i}\n".encode()))
    ]
    path = shard(tmp_path / "0.tar", parts)
    split = open_split(path)
    assert (len(split), split.pictures) == (40, 20)
    assert split.captions is not None
    assert split.captions[:2] == ("one 0", "two 0")
    assert split.names[:2] == ("00", "00 (2)")
    held = open_split(path, holdout="50%")
    assert 0 < held.pictures < 20
    assert len(held) == 2 * held.pictures
    few = open_split(path, limit=7)
    assert (few.pictures, len(few)) == (7, 14)
    assert open_split(path, limit=20).names == split.names


def test_a_worker_process_reads_from_the_copy_of_a_compressed_shard(tmp_path: Path) -> None:
    import pickle

    split = open_split(shard(tmp_path / "a.tar.gz", members(0, ["cat", "dog"]), "w:gz"))
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(np.asarray(copy.image(1)), np.asarray(picture(1, 8, 6)))
