"""What several checkpoints say of their model: equal in meaning is equal, "not said" is no value."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmerge.checkpoint.configs import from_huggingface_config, to_huggingface_config
from clipmerge.errors import MismatchError
from clipmerge.weights.model_records import _TEXT, _VISION, combined, differences
from clipmerge.weights.weights import Weights, mean

Point = Callable[..., Weights]

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 1},
}


def test_the_defaults_are_open_clips() -> None:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for ours, theirs in ((_VISION, CLIPVisionCfg()), (_TEXT, CLIPTextCfg())):
        stated = {key: value for key, value in asdict(theirs).items() if value}
        assert {key: value for key, value in ours.items() if value} == {
            key: value for key, value in stated.items() if key not in ("hf_model_pretrained",)
        }


def test_every_name_of_open_clips_is_one_model() -> None:
    import open_clip

    names = open_clip.list_models()
    configs = {name: open_clip.get_model_config(name) for name in names}
    assert not any(differences(config, json.loads(json.dumps(config))) for config in configs.values())
    assert differences(configs["ViT-B-32"], configs["ViT-B-32-quickgelu"]) == ["quick_gelu: not set and True"]
    assert differences(configs["ViT-B-32"], configs["ViT-B-16"])
    for name in ("ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14"):  # through transformers' words and back
        there = to_huggingface_config(configs[name])
        assert there is not None
        back = from_huggingface_config(there)
        assert back is not None
        assert not differences(configs[name], back), name


@given(st.data())
def test_defaults_and_spelling_make_no_difference(data: st.DataObject) -> None:
    """Any default written out or left out, lists for tuples, 4.0 for 4."""

    def respelled(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and data.draw(st.booleans()):
            return float(value)
        return value

    other: dict[str, Any] = {"embed_dim": respelled(16)}
    if data.draw(st.booleans()):
        other["quick_gelu"] = False
    for tower, defaults in (("vision_cfg", _VISION), ("text_cfg", _TEXT)):
        part = {key: respelled(value) for key, value in SMALL[tower].items()}
        part |= {
            key: value for key, value in defaults.items() if key not in part and data.draw(st.booleans())
        }
        part |= {key: None for key in ("timm_model_name", "act_kwargs") if data.draw(st.booleans())}
        other[tower] = part
    if data.draw(st.booleans()):
        other["vision_cfg"]["image_size"] = data.draw(st.sampled_from([[16, 16], (16, 16)]))
    assert not differences(SMALL, other)
    assert not differences(other, SMALL)
    tower = data.draw(st.sampled_from(["vision_cfg", "text_cfg"]))
    key = data.draw(st.sampled_from(sorted(SMALL[tower])))
    changed = {**other, tower: {**other[tower], key: 3 if key != "image_size" else [16, 32]}}
    assert [each.partition(":")[0] for each in differences(SMALL, changed)][:1] in (
        [f"{tower}.{key}"],
        [f"{tower}.mlp_ratio"],
    )


PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "size": 16}


@given(st.lists(st.sets(st.sampled_from(sorted(PREPROCESS))), min_size=1, max_size=4), st.randoms())
def test_what_any_checkpoint_says_is_kept_whatever_the_order(parts: list[set[str]], random: Any) -> None:
    records = [
        (str(i), {"preprocess": {key: PREPROCESS[key] for key in part}}) for i, part in enumerate(parts)
    ]
    random.shuffle(records)
    said = combined(records)
    assert said is not None
    assert said["preprocess"] == {key: PREPROCESS[key] for key in set().union(*parts)}


@pytest.mark.parametrize(
    ("key", "one", "same", "other"),
    [
        ("mean", [0.5] * 3, (0.5, 0.5, 0.5), [0.4] * 3),
        ("mean", 0.5, [0.5, 0.5, 0.5], 0.4),
        ("size", 16, [16, 16], [16, 32]),
        ("std", [1, 1, 1], [1.0, 1.0, 1.0], [2, 1, 1]),
        ("interpolation", "bicubic", "bicubic", "bilinear"),
        ("resize_mode", "shortest", "shortest", "squash"),
    ],
)
def test_two_statements_of_preprocessing(key: str, one: Any, same: Any, other: Any, point: Point) -> None:
    a, b, c, d = (
        point(name, 1, {"model": {"name": "m", "config": SMALL, "preprocess": stated}})
        for name, stated in zip("abcd", ({key: one}, {key: same}, {key: other}, {}), strict=True)
    )
    assert mean([d, a, b]).model == mean([b, d, a]).model
    assert (mean([d, a]).model or {})["preprocess"] == {key: one}
    with pytest.raises(MismatchError, match=rf"[ac] says {key} = .* of its images, [ac] ") as caught:
        _ = mean([c, a]).model
    assert "--model" in str(caught.value.hint)


def test_one_tower_says_what_it_knows(point: Point) -> None:
    tower = {"embed_dim": 16, "vision_cfg": SMALL["vision_cfg"]}
    image = point("image", 1, {"model": {"config": tower, "preprocess": {"mean": [0.5] * 3}}})
    whole = point("whole", 1, {"model": {"name": "small", "config": SMALL}})
    for pair in ([image, whole], [whole, image]):
        assert mean(pair).model == {"name": "small", "config": SMALL, "preprocess": {"mean": [0.5] * 3}}
    wider = {**tower, "vision_cfg": {**SMALL["vision_cfg"], "width": 64}}
    with pytest.raises(MismatchError, match=r"vision_cfg\.width: (128 and 64|64 and 128)"):
        _ = mean([whole, point("wider", 1, {"model": {"config": wider}})]).model


def test_an_archive_of_openais_and_a_model_without_quick_gelu_are_not_mixed_silently(point: Point) -> None:
    archive = point("archive", 1, {"quick_gelu": True})
    quick, plain, silent = (
        point(name, 1, {"model": {"name": name, "config": {**SMALL, **more}}} if more is not None else {})
        for name, more in (("quick", {"quick_gelu": True}), ("plain", {}), ("silent", None))
    )
    assert (mean([archive, quick, silent]).model or {})["config"]["quick_gelu"] is True
    assert mean([archive, silent]).model is None
    with pytest.raises(MismatchError, match="archive needs QuickGELU, the configuration of plain has none"):
        _ = mean([archive, plain]).model
