"""Pixels once: exactly the plain transform, kept on disk, noticed when the file is not what it was."""

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from blake3 import blake3
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.data.open import open_split
from clipmerge.data.pixels import mean_and_std, normalise, pixels
from clipmerge.data.split import Split
from clipmerge.errors import DataError, OutputError

from .conftest import MakeFolder, picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CFG: dict[str, Any] = {"size": 16, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bicubic"}


@pytest.fixture
def every_mode(tmp_path: Path) -> Split:
    """Images of several sizes in every mode that data sets hold, with the traps of each."""
    root = tmp_path / "modes" / "all"
    root.mkdir(parents=True)
    for i, (width, height) in enumerate([(40, 30), (17, 55), (16, 16), (5, 4), (301, 211)]):
        picture(i, width, height).save(root / f"rgb{i}.jpg", quality=60 + 8 * i)
    image = picture(9, 33, 47)
    image.convert("L").save(root / "grey.jpg")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.save(root / "progressive.jpg", progressive=True)
    image.convert("RGBA").save(root / "rgba.png")
    image.convert("LA").save(root / "la.png")
    image.convert("1").save(root / "bilevel.png")
    image.quantize(16).save(root / "palette.png")
    image.quantize(16).save(root / "transparent.png", transparency=bytes(range(0, 256, 16)))
    image.save(root / "lossy.webp")
    image.save(root / "one.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "turned.jpg", exif=exif)
    return open_split(tmp_path / "modes")


def plain(split: Split, cfg: dict[str, Any]) -> torch.Tensor:
    """open_clip's own transform of what torchvision's own loader reads."""
    from torchvision.datasets.folder import default_loader

    transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False)
    paths = [split.images.paths[i] for i in split.index]  # type: ignore[attr-defined]
    return torch.stack([transform(default_loader(str(path))) for path in paths])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 127},
        {"size": (12, 20)},
        {"size": [14, 14], "mean": (0.5,) * 3, "std": (0.5,) * 3},
    ],
)
def test_pixels_and_normalise_are_the_plain_transform_bit_for_bit(
    every_mode: Split, change: dict[str, Any]
) -> None:
    cfg = CFG | change
    kept = pixels(every_mode, cfg)
    assert kept.dtype == np.uint8
    expected = plain(every_mode, cfg)
    assert kept.shape == expected.shape
    made = normalise(torch.from_numpy(kept), *mean_and_std(cfg, "cpu"))
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)


def test_normalise_is_exact_for_every_value_of_a_pixel() -> None:
    from torchvision.transforms import Normalize
    from torchvision.transforms.functional import to_tensor

    image = Image.fromarray(np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, -1))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert torch.equal(
        normalise(values, *mean_and_std(CFG, "cpu"))[0], Normalize(MEAN, STD)(to_tensor(image))
    )
    assert values.dtype == torch.uint8, "the input stays as it is"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalise_is_the_same_on_a_gpu() -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    assert torch.equal(
        normalise(values.cuda(), *mean_and_std(CFG, "cuda")).cpu(),
        normalise(values, *mean_and_std(CFG, "cpu")),
    )


def test_a_full_disk(folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    split = open_split(folder(cat=1, dog=1))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        pixels(split, CFG, cache=tmp_path / "c")
    assert list((tmp_path / "c" / "pixels").iterdir()) == []


def test_later_runs_decode_nothing(
    folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(cat=3, dog=2)
    first = pixels(open_split(root), CFG, cache=tmp_path / "c")
    monkeypatch.setattr("clipmerge.data.split.decode", None)
    again = pixels(open_split(root), CFG | {"mean": (0.0,) * 3}, cache=tmp_path / "c")
    assert np.array_equal(first, again), "mean and std do not matter to uint8"
    assert len(list((tmp_path / "c" / "pixels").iterdir())) == 1


def test_the_transform_and_the_content_are_in_the_key(folder: MakeFolder, tmp_path: Path) -> None:
    split = open_split(folder(cat=1, dog=2))
    for cfg in (CFG, CFG | {"size": 8}, CFG | {"interpolation": "bilinear"}, CFG | {"resize_mode": "squash"}):
        pixels(split, cfg, cache=tmp_path / "c")
    pixels(split.subset([1, 0]), CFG, cache=tmp_path / "c")
    pixels(open_split(f"{split.source}@invert"), CFG, cache=tmp_path / "c")
    assert len(list((tmp_path / "c" / "pixels").iterdir())) == 6


def test_the_key_is_what_it_always_was(folder: MakeFolder, tmp_path: Path) -> None:
    split = open_split(folder(cat=1, dog=1))
    pixels(split, CFG, cache=tmp_path / "c")
    text = json.dumps(
        {
            "fill_color": 0,
            "interpolation": "bicubic",
            "pillow": PIL.__version__,
            "resize_mode": "shortest",
            "size": [16, 16],
        }
    )
    expected = blake3(b"clipmerge pixels 1\0" + text.encode() + split.keys.tobytes()).hexdigest()
    assert [path.stem for path in (tmp_path / "c" / "pixels").iterdir()] == [expected]


def test_changing_the_array_changes_no_file(folder: MakeFolder) -> None:
    split = open_split(folder(cat=2, dog=1))
    kept = pixels(split, CFG)
    before = kept.copy()
    kept[:] = 0
    assert np.array_equal(pixels(split, CFG), before)


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def forge(data: bytes) -> bytes:
    return data[:-32] + bytes(32)


@pytest.mark.parametrize("damage", [cut, flip, forge, lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_file_is_made_again(folder: MakeFolder, tmp_path: Path, damage: Any) -> None:
    split = open_split(folder(cat=2, dog=1))
    before = np.array(pixels(split, CFG, cache=tmp_path / "c"))
    (path,) = (tmp_path / "c" / "pixels").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(pixels(split, CFG, cache=tmp_path / "c"), before)
    assert path.stat().st_size == before.size + 32


def test_writers_of_the_same_file_do_not_meet(folder: MakeFolder, tmp_path: Path) -> None:
    split = open_split(folder(cat=20, dog=20))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(pixels(split, CFG, cache=tmp_path / "c")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result, results[0]) for result in results)
    assert [p.suffix for p in (tmp_path / "c" / "pixels").iterdir()] == [".u8"]


def test_images_that_do_not_decode_are_all_named_and_nothing_is_kept(
    folder: MakeFolder, tmp_path: Path
) -> None:
    root = folder(cat=12, dog=2)
    for i in range(11):
        data = (root / "cat" / f"{i}.jpg").read_bytes()
        (root / "cat" / f"{i}.jpg").write_bytes(data[: len(data) * 9 // 10])
    split = open_split(root)
    with pytest.raises(DataError) as caught:
        pixels(split, CFG, cache=tmp_path / "c")
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{root}: 11 items cannot be used"
    assert lines[1].startswith("  cat/0.jpg: image file is truncated")
    assert lines[-1] == "  … and 1 more"
    assert list((tmp_path / "c" / "pixels").iterdir()) == []
    assert len(pixels(open_split(root, skip_bad=True), CFG, cache=tmp_path / "c")) == 3


def test_progress_is_told(folder: MakeFolder, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    split = open_split(folder(cat=70, dog=2))
    pixels(split, CFG, cache=tmp_path / "c", on_progress=lambda *step: told.append(step))
    assert told == [("decoding images", 64, 72), ("decoding images", 72, 72)]


def test_a_cache_that_cannot_be_written(folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        pixels(open_split(folder(cat=1, dog=1)), CFG, cache=tmp_path / "file")
    assert str(tmp_path / "file") in caught.value.message
    assert caught.value.hint == "make room, or choose another folder for caches with CLIPMERGE_CACHE"


def test_images_that_go_away_or_change_after_they_were_opened(folder: MakeFolder, tmp_path: Path) -> None:
    split = open_split(folder(cat=2, dog=1))
    (Path(split.source) / "cat" / "0.jpg").unlink()
    picture(77).save(Path(split.source) / "cat" / "1.jpg")
    with pytest.raises(DataError, match=r"cat/0\.jpg: no such file") as caught:
        pixels(split, CFG, cache=tmp_path / "c")
    assert "cat/1.jpg: changed since it was opened" in caught.value.message


def test_where_caches_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPMERGE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("CLIPMERGE_CACHE")
    assert cache_dir().name == "clipmerge"


@pytest.mark.skipif("CLIPMERGE_TEST_DATA" not in os.environ, reason="CLIPMERGE_TEST_DATA names no folder")
@pytest.mark.parametrize("name", ["cifar10.npz", "eurosat.npz", "gtsrb.npz"])
def test_real_images(name: str) -> None:
    split = open_split(f"{os.environ['CLIPMERGE_TEST_DATA']}/{name}#val", limit=60)
    transform = image_transform_v2(PreprocessCfg(**(CFG | {"size": 224})), is_train=False)
    stored = [split.read_bytes(i) or b"" for i in range(len(split))]
    expected = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in stored])
    kept = pixels(split, CFG | {"size": 224})
    assert torch.equal(normalise(torch.from_numpy(kept), *mean_and_std(CFG, "cpu")), expected)
