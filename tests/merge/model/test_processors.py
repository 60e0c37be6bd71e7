"""Images prepared as transformers' processors prepare them: the installed library says what is right."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmerge.checkpoint.configs import from_huggingface_config, model_beside
from clipmerge.checkpoint.processors import from_processor, to_processor
from clipmerge.data.pixels import pixels
from clipmerge.errors import ModelError
from clipmerge.model import ModelSpec, eval_transform

SHAPES = ((20, 31), (33, 18), (17, 17), (9, 40))
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (*s, 3), np.uint8))
    for i, s in enumerate(SHAPES)
]

CLIP: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
                        "crop_size": {"height": 16, "width": 16}}  # fmt: skip
SIGLIP: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}}


def theirs(document: Mapping[str, Any]) -> Any:
    """transformers' own processor of this file, by PIL (the torchvision one rounds differently by itself)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    word = document.get("image_processor_type") or document.get("feature_extractor_type") or "CLIP"
    return (SiglipImageProcessorPil if word.startswith("Siglip") else CLIPImageProcessorPil).from_dict(
        dict(document)
    )


def spec_of(preprocess: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec.from_metadata(
        {"name": "m", "config": {"vision_cfg": {"image_size": 16}}, "preprocess": preprocess}
    )


def assert_equal_pixels(document: Mapping[str, Any]) -> None:
    spec, processor = spec_of(from_processor(document, "clip")), theirs(document)
    transform = eval_transform(spec)
    for image in IMAGES:
        right = processor(image, return_tensors="np")["pixel_values"][0]
        ours = transform(image).numpy()
        assert ours.shape == right.shape, document
        np.testing.assert_allclose(ours, right, rtol=2e-5, atol=2e-5, err_msg=str(document))


SIZES: tuple[dict[str, Any], ...] = (
    {"size": 16, "crop_size": 16},
    {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    {"size": {"shortest_edge": 19}, "crop_size": 16},
    {"size": {"shortest_edge": 12}, "crop_size": {"height": 16, "width": 13}},
    {"size": {"height": 16, "width": 16}, "crop_size": 16},
    {"size": {"height": 21, "width": 14}, "crop_size": [16, 12]},
    {"size": [15, 18], "crop_size": 16},
    {},
)  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    words = ("do_resize", "do_rescale", "do_normalize")
    for size, *switches in itertools.product(SIZES[:-1], *[(True, False)] * 3):
        yield {**CLIP, **size, **dict(zip(words, switches, strict=True)), "image_mean": [0.4, 0.5, 0.6]}
    for resample, size in itertools.product(range(6), SIZES[1:6]):
        yield {**CLIP, **size, "resample": resample}
    for size in ({"height": 16, "width": 16}, {"height": 12, "width": 20}, [14, 16]):
        for resample, rescale in itertools.product((0, 2, 3), (True, False)):
            yield {**SIGLIP, "size": size, "resample": resample, "do_rescale": rescale}
    yield {**CLIP, "do_center_crop": False, "size": {"height": 12, "width": 20}}
    yield {**CLIP, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}
    yield {**CLIP, "do_convert_rgb": False}
    yield {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "resample": 3}
    yield {key: value for key, value in CLIP.items() if key != "image_processor_type"}


def test_pixels_are_transformers_own_over_a_grid_of_files() -> None:
    documents = list(grid())
    assert len(documents) > 100
    for document in documents:
        assert_equal_pixels(document)


def test_defaults_are_those_of_the_class() -> None:
    for word in ("CLIPImageProcessor", "SiglipImageProcessor"):
        document = {"image_processor_type": word}
        image = IMAGES[0].resize((301, 240))
        ours = eval_transform(spec_of(from_processor(document, "")))(image).numpy()
        np.testing.assert_allclose(
            ours, theirs(document)(image, return_tensors="np")["pixel_values"][0], atol=2e-5
        )
    assert from_processor({"resample": 3}, "siglip2")["mean"] == [0.5] * 3
    assert from_processor({**SIGLIP, "size": 16}, "")["resize_mode"] == "squash"  # a number is a square there


def test_our_file_of_a_preprocessing_means_the_same_to_transformers() -> None:
    for document in grid():
        ours = from_processor(document, "clip")
        written = to_processor(spec_of(ours).preprocess)
        assert written is not None, document
        assert_equal_pixels(written)
        again = from_processor(json.loads(json.dumps(written)), "clip")
        for image in IMAGES[:2]:
            a, b = (eval_transform(spec_of(cfg))(image).numpy() for cfg in (ours, again))
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"do_center_crop": False}, "images of different sizes"),
        ({"do_center_crop": False, "do_resize": False}, "images of different sizes"),
        ({"size": {"shortest_edge": 16, "longest_edge": 30}}, "images of different sizes"),
        ({"size": {"max_height": 16, "max_width": 30}}, "images of different sizes"),
        ({"resample": 9}, "resample 9"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
        ({"image_processor_type": "FuyuImageProcessor"}, "FuyuImageProcessor"),
    ],
)
def test_what_is_not_done_is_refused_by_name_where_images_are_prepared(
    change: dict[str, Any], named: str
) -> None:
    preprocess = from_processor({**CLIP, **change}, "clip")
    with pytest.raises(ModelError, match=f"cannot be prepared: its processor asks for .*{named}"):
        eval_transform(spec_of(preprocess))
    assert to_processor(spec_of(preprocess).preprocess) is None


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "model.safetensors"


HALF = {**CLIP, "image_mean": [0.5] * 3}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": HALF},
        {"processor_config": {"image_processor": HALF, "processor_class": "CLIPProcessor"}},
        {"processor_config": {"image_processor": HALF}, "preprocessor_config": CLIP},  # the nested one wins
        {"processor_config": {"processor_class": "CLIPProcessor"}, "preprocessor_config": HALF},
    ],
)
def test_old_and_new_names_of_a_processors_file(files: dict[str, Any], tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = write(tmp_path, config={"model_type": "clip", "text_config": {}, "vision_config": {}}, **files)
    record = model_beside(path)
    assert record is not None
    assert (
        record["preprocess"]["mean"]
        == list(CLIPImageProcessorPil.from_pretrained(tmp_path).image_mean)
        == [0.5] * 3
    )


def test_a_processor_beside_a_model_that_open_clip_lacks_is_read_too(tmp_path: Path) -> None:
    path = write(tmp_path, config={"model_type": "siglip2"}, preprocessor_config=SIGLIP)
    assert model_beside(path) == {"preprocess": from_processor(SIGLIP, "siglip2")}


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 96}


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": SMALL, "vision_config": SMALL},
        {"text_config_dict": SMALL, "vision_config_dict": SMALL},
        {
            "text_config": {"hidden_size": 32},
            "text_config_dict": SMALL,
            "vision_config": {},
            "vision_config_dict": SMALL,
        },
        {"text_config": SMALL, "vision_config": SMALL, "text_config_dict": None, "vision_config_dict": {}},
        {"text_config": {}, "vision_config": {"hidden_act": "quick_gelu"}, "projection_dim": 99},
        {"text_config": {**SMALL, "hidden_act": "gelu"}, "vision_config": {**SMALL, "hidden_act": "gelu"}},
    ],
)
def test_configurations_mean_what_they_mean_to_transformers(config: dict[str, Any]) -> None:
    from transformers import CLIPConfig

    right = CLIPConfig.from_dict({"model_type": "clip", **json.loads(json.dumps(config))})
    ours = from_huggingface_config({"model_type": "clip", **config})
    assert ours is not None
    text, vision = right.text_config, right.vision_config
    assert ours["embed_dim"] == right.projection_dim
    assert ours["quick_gelu"] is (vision.hidden_act == "quick_gelu")
    assert (ours["text_cfg"]["width"], ours["text_cfg"]["heads"]) == (
        text.hidden_size,
        text.num_attention_heads,
    )
    assert (ours["text_cfg"]["layers"], ours["text_cfg"]["context_length"]) == (
        text.num_hidden_layers, text.max_position_embeddings,
    )  # fmt: skip
    assert ours["vision_cfg"]["width"] == vision.hidden_size
    assert ours["vision_cfg"]["head_width"] * vision.num_attention_heads == vision.hidden_size
    assert ours["vision_cfg"]["mlp_ratio"] * vision.hidden_size == vision.intermediate_size
    assert ours["vision_cfg"]["image_size"] == vision.image_size


def test_decoded_pixels_take_the_steps_and_are_kept_apart(tmp_path: Path) -> None:
    from clipmerge.data.open import open_split

    for name, image in zip("abcd", IMAGES, strict=True):
        (tmp_path / "img" / name).mkdir(parents=True)
        image.save(tmp_path / "img" / name / "0.png")
    split = open_split(str(tmp_path / "img"))
    document = {**CLIP, "size": {"shortest_edge": 19}, "do_normalize": False, "do_rescale": False}
    plain = from_processor(CLIP, "clip")
    ours = pixels(split, spec_of(from_processor(document, "clip")).preprocess, cache=tmp_path)
    right = theirs(document)(IMAGES, return_tensors="np")["pixel_values"]
    assert np.array_equal(ours, right)
    assert not np.array_equal(pixels(split, spec_of(plain).preprocess, cache=tmp_path), ours)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resample": [3]},
        {"rescale_factor": "0.5"},
        {"rescale_factor": 0},
        {"size": {"height": "a", "width": 16}},
        {"size": -3},
        {"size": True},
        {"crop_size": 10**9},
        {"image_mean": "x"},
        {"image_mean": [0.5]},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0, 0.5, 0.5]},
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_named_and_never_used(wrong: dict[str, Any]) -> None:
    """Merging needs no images and goes on; scoring refuses by this text."""
    ((field, value),) = wrong.items()
    assert from_processor({**CLIP, **wrong}, "clip") == {"unread": f"{field} = {str(value)!r}"}
