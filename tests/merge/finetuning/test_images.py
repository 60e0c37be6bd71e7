"""Training images: open_clip's crop from each image's own seed, and pixels that arrive in order."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipmerge.errors import DataError, TrainingError
from clipmerge.finetuning.augment import Crop, device_crops, parse_augmentation
from clipmerge.finetuning.batches import Batch, Sampler, fit_batch, set_shares
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers

PREPROCESS = {
    "size": 32,
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CPU = torch.device("cpu")


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_crop_is_torchvisions_given_its_box() -> None:
    """What torchvision's RandomResizedCrop does with the box that we drew."""
    from torchvision.transforms import functional as tf

    make = parse_augmentation("crop:0.3", PREPROCESS)
    assert make is not None
    top, left, height, width = Crop((0.3, 1.0)).draw(40, 60, random.Random("s"))
    expected = tf.resized_crop(noise(), top, left, height, width, [32, 32], tf.InterpolationMode.BICUBIC)
    assert np.array_equal(make(noise(), "s"), np.asarray(expected).transpose(2, 0, 1))


def test_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    ours = np.array([Crop((0.2, 1.0)).draw(48, 64, random.Random(i)) for i in range(2000)])
    torch.manual_seed(0)
    image = torch.zeros(3, 48, 64)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1.2
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 1.2


def test_crops_on_the_device_show_what_the_box_holds() -> None:
    """A smooth image, so that bilinear and bicubic agree: the same box, mirrored where the draw says so."""
    rows = np.linspace(0, 255, 64)
    smooth = np.stack(
        [np.add.outer(rows, rows) / 2, np.add.outer(rows, 0 * rows), np.add.outer(0 * rows, rows)], -1
    )
    image = Image.fromarray(smooth.astype(np.uint8))
    square = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    seeds = [f"0/0/{i}" for i in range(12)]
    on_device = device_crops("crop:0.3+flip", PREPROCESS)(square.expand(12, 3, 64, 64), seeds)
    make = parse_augmentation("crop:0.3+flip", PREPROCESS)
    assert make is not None
    expected = torch.from_numpy(np.stack([make(image, seed) for seed in seeds]).astype(np.float32))
    assert (on_device - expected).abs().max() < 3
    with pytest.raises(TrainingError, match="only crops and flips"):
        device_crops("crop+jitter:0.4", PREPROCESS)


def test_a_cfg_of_open_clip_is_the_same_crop() -> None:
    by_text, by_cfg = (
        parse_augmentation("crop:0.5+gray:0.2", PREPROCESS),
        parse_augmentation({"scale": [0.5, 1.0], "gray_scale_prob": 0.2}, PREPROCESS),
    )
    assert by_text is not None
    assert by_cfg is not None
    assert np.array_equal(by_text(noise(), "1"), by_cfg(noise(), "1"))


@pytest.mark.parametrize(
    "augment",
    ["crop", "flip", "jitter:0.4", "jitter:0.4,0.4,0.4,0.1", "gray:0.5", "randaugment:2,9",
     {"scale": [0.5, 1.0], "color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.8}],
)  # fmt: skip
def test_an_image_depends_on_its_seed_alone(augment: Any) -> None:
    make = parse_augmentation(augment, PREPROCESS)
    assert make is not None
    state = random.getstate(), torch.get_rng_state()
    image = noise(50, 50)
    first = make(image, "0/0/1")
    others = [make(image, f"0/0/{i}") for i in range(2, 8)]
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, make(image, "0/0/1"))
    assert any(not np.array_equal(first, other) for other in others)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_nothing_random_is_no_augmentation() -> None:
    assert parse_augmentation("none", PREPROCESS) is None
    with pytest.raises(TrainingError, match="magnitude is 31"):
        parse_augmentation("randaugment:2,31", PREPROCESS)


def test_pixels_are_to_tensor_and_normalise(tiny_spec: Any) -> None:
    from clipmerge.model import build_model, eval_transform

    towers = Towers(build_model(tiny_spec, seed=0), tiny_spec.preprocess)
    image = noise(16, 16)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    assert torch.equal(towers.prepare(pixels)[0], eval_transform(tiny_spec)(image))


def test_an_epoch_visits_each_item_once_and_draws_a_prompt_of_its_class() -> None:
    labels = np.arange(23) % 3
    sampler = Sampler(labels, labels * 4, 4, seed=5, batch=3, micro=2)
    assert sampler.steps_per_epoch == 3
    batches = list(sampler.batches(0, 6))
    first, second = (np.concatenate([b.items for b in batches if b.epoch == e]) for e in (0, 1))
    assert len(set(first.tolist())) == 18
    assert first.tolist() != second.tolist()
    for batch in batches:
        assert (batch.prompts // 4 == batch.labels).all()
        assert (batch.labels == labels[batch.items]).all()
    drawn = {int(p % 4) for b in batches for p in b.prompts}
    assert drawn == {0, 1, 2, 3}


def test_the_sampler_starts_anywhere() -> None:
    sampler = Sampler(np.zeros(10, np.int64), np.zeros(10, np.int64), 5, seed=1, batch=4)
    whole = list(sampler.batches(0, 9))
    for a, b in zip(whole[5:], sampler.batches(5, 9), strict=True):
        assert a.step == b.step
        assert a.items.tolist() == b.items.tolist()
        assert a.prompts.tolist() == b.prompts.tolist()


def test_batches_shrink_to_few_images() -> None:
    assert fit_batch(512, 1, 1, 60) == 60
    assert fit_batch(16, 2, 2, 60) == 30
    assert fit_batch(16, 2, 1, 60) == 32


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_ranks_share_a_batch_in_order(
    train: Any, tiny_spec: Any, workers: int, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(augment=augment, workers=0)
    images = Images(train, None, tiny_spec.preprocess, CPU, settings)
    order = np.array([5, 3, 9, 1], dtype=np.int64)
    batches = [Batch(0, 0, order, order, order), Batch(1, 0, order[::-1].copy(), order, order)]
    whole = [p for _, p in images.loader()(batches)]
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        monkeypatch.setattr("clipmerge.finetuning.images.share", lambda n, own=own: own)
        loader = replace(images, settings=Settings(augment=augment, workers=workers)).loader()
        for (_, pixels), expected in zip(loader(batches), whole, strict=True):
            assert torch.equal(pixels, expected[2 * rank : 2 * rank + 2])
    if augment == "none":
        assert torch.equal(whole[0], torch.from_numpy(images.plain()[order]))


def test_corruptions_are_between_nothing_and_their_value(train: Any) -> None:
    """Half of the visits see an image as it is; the others see it changed, each by a strength of its own."""
    preprocess = {"size": (16, 16)}
    for text in ("noise:0.2", "blur:2", "contrast:0.3", "brightness:2", "pixelate:4", "rotate:20", "jpeg:5"):
        plain, changed = (parse_augmentation(f"crop:1+{steps}", preprocess) for steps in ("jitter:0", text))
        assert plain is not None and changed is not None  # noqa: PT018
        image = train.image(0)
        far = [np.abs(changed(image, str(i)).astype(int) - plain(image, str(i))).mean() for i in range(40)]
        untouched = sum(distance == 0 for distance in far)
        assert 8 <= untouched <= 32, text
        assert len({round(float(d), 6) for d in far}) > 5, text
        np.testing.assert_array_equal(changed(image, "7"), changed(image, "7"))
    with pytest.raises(DataError, match="not a value for the shift 'noise'"):
        parse_augmentation("noise:7", preprocess)
    with pytest.raises(TrainingError, match="no augmentation"):
        parse_augmentation("invert", preprocess)


def test_sets_are_drawn_by_their_shares_and_every_item_comes_before_one_comes_again() -> None:
    labels = np.zeros(100, np.int64)
    sets = set_shares({"a": 3, "b": 1}, {"a": 90, "b": 10})
    sampler = Sampler(labels, labels, 1, seed=0, batch=10, sets=sets)
    epochs = [np.concatenate([b.items for b in sampler.batches(10 * e, 10 * e + 10)]) for e in range(4)]
    assert [int((items < 90).sum()) for items in epochs] == [75] * 4
    seen = np.concatenate(epochs)
    assert set(np.bincount(seen[seen < 90], minlength=90)) == {3, 4}  # 300 draws of 90 items
    assert set(np.bincount(seen[seen >= 90] - 90)) == {10}  # 100 draws of 10
    again = [b.items for b in sampler.batches(17, 19)]
    np.testing.assert_array_equal(np.concatenate(again), epochs[1][70:90])
    assert any((np.diff(items[:20]) < 0).any() for items in epochs)
    sizes = {"a": 400, "b": 100}
    assert [share for _, share in set_shares("root", sizes)] == [20, 10]
    assert set_shares("a=1, b=2".replace(" ", ""), sizes) == ((400, 1.0), (100, 2.0))
    assert set_shares("size", sizes) == ()
    for wrong in ("a=1", "halves", {"a": 1, "b": 0}, "a=1,c=2"):
        with pytest.raises(TrainingError, match="no share to each of a, b"):
            set_shares(wrong, sizes)
