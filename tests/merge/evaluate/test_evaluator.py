"""The Evaluator: the same answers as open_clip's plain code, at less cost."""

import numpy as np
import pytest
import torch

from clipmerge.data.open import open_split
from clipmerge.errors import DataError, DeviceError, ModelError, NonFiniteError, SelectionError
from clipmerge.evaluate.evaluator import Evaluator, score
from clipmerge.model import build_model, eval_transform, get_tokenizer
from clipmerge.weights.weights import from_state_dict, load, mean

TEMPLATES = ["a photo of a {}.", "the number {}."]


def plain_logits(spec, path, split, templates):
    """What a user of open_clip would write."""
    import open_clip
    from safetensors.torch import load_file

    model = build_model(spec, seed=0)
    model.load_state_dict(load_file(path))
    transform = eval_transform(spec)
    images = torch.stack([transform(split.image(i)) for i in range(len(split))])
    with torch.no_grad():
        head = open_clip.build_zero_shot_classifier(model, get_tokenizer(spec), split.classes, templates)
        return model.logit_scale.exp() * model.encode_image(images, normalize=True) @ head


def test_logits_are_those_of_the_plain_code(tiny_spec, tiny_checkpoints, digits):
    evaluator = Evaluator(digits, tiny_spec, templates=TEMPLATES)
    for name in ("base", "ft1"):
        expected = plain_logits(tiny_spec, tiny_checkpoints[name], digits, TEMPLATES)
        got = evaluator.logits(load(tiny_checkpoints[name]))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # logits are about 14 times a cosine
        result = evaluator.score(load(tiny_checkpoints[name]))
        np.testing.assert_array_equal(result.predictions, expected.argmax(1).numpy())
        assert result.value == (expected.argmax(1).numpy() == digits.labels).mean()
        assert result.correct == int(result.correct_mask.sum())
        top5 = expected.topk(5).indices.numpy() == digits.labels[:, None]
        assert result.metrics["top5"] == pytest.approx(top5.any(1).mean())


def test_siglips_bias_is_part_of_the_logits(tiny_model_config, digits):
    from clipmerge.model import ModelSpec, weights_of

    config = {**tiny_model_config, "custom_text": True, "init_logit_bias": -10.0, "init_logit_scale": 2.0}
    spec = ModelSpec("siglip-like", config, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3})
    model = build_model(spec, seed=3)
    images = torch.stack([eval_transform(spec)(digits.image(i)) for i in range(20)])
    tokens = get_tokenizer(spec)([f"the digit {name}" for name in digits.classes])
    with torch.no_grad():
        expected, _ = model.get_logits(images, tokens)
    evaluator = Evaluator(digits.subset(range(20)), templates="the digit {}")
    torch.testing.assert_close(evaluator.logits(weights_of(model, spec)), expected, rtol=0, atol=1e-4)


def test_coca_is_scored_like_any_other(tiny_model_config, digits):
    from clipmerge.model import ModelSpec, weights_of

    text = {**tiny_model_config["text_cfg"], "embed_cls": True, "output_tokens": True}
    vision = {
        **tiny_model_config["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    }
    decoder = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 16,
        "text_cfg": text,
        "vision_cfg": vision,
        "multimodal_cfg": decoder,
        "custom_text": True,
    }
    spec = ModelSpec("coca-like", config, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3})
    model = build_model(spec, seed=3)
    evaluator = Evaluator(digits.subset(range(20)), templates="the digit {}")
    images = torch.stack([eval_transform(spec)(digits.image(i)) for i in range(20)])
    tokens = get_tokenizer(spec)([f"the digit {name}" for name in digits.classes])
    with torch.no_grad():
        expected = model.logit_scale.exp() * model.encode_image(images) @ model.encode_text(tokens).T
    torch.testing.assert_close(evaluator.logits(weights_of(model, spec)), expected, rtol=0, atol=1e-4)


def test_the_fixtures_disagree(evaluator, weights):
    scores = [evaluator.score(w) for w in weights.values()]
    assert len({s.correct for s in scores}) > 2
    assert all(len(np.unique(s.predictions)) > 2 for s in scores)


def test_a_batch_size_changes_nothing(tiny_spec, digits, weights):
    small = Evaluator(digits, tiny_spec, batch_size=7).logits(weights["ft0"])
    large = Evaluator(digits, tiny_spec, batch_size=500).logits(weights["ft0"])
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_weights_that_record_their_model_need_no_name(tiny_spec, digits, weights, tmp_path):
    from clipmerge.model import save_model

    model = build_model(tiny_spec)
    weights["ft0"].load_into(model)
    path = save_model(model, tiny_spec, tmp_path / "own.safetensors")
    named = Evaluator(digits, tiny_spec).score(weights["ft0"])
    assert Evaluator(digits).score(load(path)).to_json() == named.to_json()


def test_one_head_for_checkpoints_that_share_a_text_tower(tiny_spec, digits, tiny_checkpoints, tmp_path):
    from safetensors.torch import load_file

    built = []

    def on_progress(what, done, total):
        if what == "encoding prompts" and done == total:
            built.append(done)

    base, other = load_file(tiny_checkpoints["base"]), load_file(tiny_checkpoints["ft0"])
    family = [
        from_state_dict(
            {k: other[k] * s + base[k] * (1 - s) if k.startswith("visual.") else base[k] for k in base}
        )
        for s in (0.0, 0.5, 1.0)
    ]
    evaluator = Evaluator(digits, tiny_spec, cache=tmp_path, on_progress=on_progress)
    for weights in (*family, mean(family)):
        evaluator.score(weights)
    assert len(built) == 1
    Evaluator(digits, tiny_spec, cache=tmp_path, on_progress=on_progress).score(family[0])
    assert len(built) == 1, "the head was kept on disk"
    evaluator.score(load(tiny_checkpoints["ft0"]))
    assert len(built) == 2, "another text tower is another head"


def test_a_trained_head_takes_the_place_of_prompts(tiny_spec, digits, tiny_checkpoints):
    from safetensors.torch import load_file

    tensors = load_file(tiny_checkpoints["base"])
    draw = torch.Generator().manual_seed(0)
    head = {
        "classification_head.weight": torch.randn(10, 16, generator=draw),
        "classification_head.bias": torch.randn(10, generator=draw),
    }
    evaluator = Evaluator(digits, tiny_spec)
    trained = from_state_dict({**tensors, **head})
    features = evaluator.features(trained)
    expected = features @ head["classification_head.weight"].T + head["classification_head.bias"]
    torch.testing.assert_close(evaluator.logits(trained), expected)
    # model-soups' files have no text transformer at all
    without_text = {k: v for k, v in tensors.items() if not k.startswith("transformer.")}
    torch.testing.assert_close(evaluator.logits(from_state_dict({**without_text, **head})), expected)
    # WiSE-FT's law: between two heads over one tower, logits interpolate
    other = {**tensors, **{k: 2 * v + 1 for k, v in head.items()}}
    half = evaluator.logits(mean([trained, from_state_dict(other, "other")]))
    torch.testing.assert_close(half, (expected + evaluator.logits(from_state_dict(other))) / 2)
    # and a checkpoint without a head afterwards is scored by its prompts again
    zero_shot = evaluator.score(from_state_dict(tensors))
    assert zero_shot.to_json() == Evaluator(digits, tiny_spec).score(load(tiny_checkpoints["base"])).to_json()


def test_a_head_for_other_classes_is_refused(tiny_spec, digits, tiny_checkpoints):
    from safetensors.torch import load_file

    tensors = {**load_file(tiny_checkpoints["base"]), "classification_head.weight": torch.zeros(7, 16)}
    with pytest.raises(ModelError, match="the head has 7 classes, digits#val has 10"):
        Evaluator(digits, tiny_spec).score(from_state_dict(tensors))


def test_a_subset_of_the_classes_restricts_predictions(tiny_spec, digits, weights):
    from dataclasses import replace

    chosen = np.array([2, 5, 7])
    some = digits.subset(np.flatnonzero(np.isin(digits.labels, chosen)))
    part = replace(some, class_subset=chosen)
    full = Evaluator(some, tiny_spec).logits(weights["ft1"])
    evaluator = Evaluator(part, tiny_spec)
    result = evaluator.score(weights["ft1"])
    np.testing.assert_array_equal(result.predictions, chosen[full[:, chosen].argmax(1).numpy()])
    assert result.metrics["top5"] == 1.0
    assert torch.isinf(evaluator.logits(weights["ft1"])).sum() == len(some) * 7


def test_several_splits_load_the_weights_once(tiny_spec, digits, weights, monkeypatch):
    evaluator = Evaluator({"id": digits, "shift": open_split("digits#val@invert", limit=120)}, tiny_spec)
    loads = []
    from clipmerge.evaluate.resident import Resident

    real = Resident.load
    monkeypatch.setattr(Resident, "load", lambda self, w: loads.append(w) or real(self, w))
    scores = evaluator.scores(weights["base"])
    assert list(scores) == ["id", "shift"]
    assert len(loads) == 1
    assert evaluator.images_scored == 240


def test_groups_and_the_deciding_metric(tiny_spec, digits, weights):
    from dataclasses import replace

    grouped = replace(digits, groups=np.arange(len(digits)) % 3)
    result = Evaluator(grouped, tiny_spec, metric="worst_group").score(weights["base"])
    assert result.value == min(result.correct_mask[grouped.groups == g].mean() for g in range(3))
    with pytest.raises(SelectionError, match="worst_group needs images in groups"):
        Evaluator(digits, tiny_spec, metric="worst_group")
    with pytest.raises(SelectionError, match="did you mean top5"):
        Evaluator(digits, tiny_spec, metric="top_5")


def test_bfloat16_is_close_to_fp32(tiny_spec, digits, weights):
    full = Evaluator(digits, tiny_spec).logits(weights["base"])
    half = Evaluator(digits, tiny_spec, precision="bf16").logits(weights["base"])
    assert 0 < (full - half).abs().max() < 1.0
    with pytest.raises(DeviceError, match="there is no precision 'int8'"):
        Evaluator(digits, tiny_spec, precision="int8")


def test_the_data_key_covers_all_but_the_weights(tiny_spec, digits, weights):
    key = Evaluator(digits, tiny_spec).data_key(None, weights["base"])
    assert key == Evaluator({"any": digits}, tiny_spec, batch_size=3).data_key(None, weights["base"])
    others = [
        Evaluator(digits, tiny_spec, templates="a {}").data_key(None, weights["base"]),
        Evaluator(digits, tiny_spec, precision="bf16").data_key(None, weights["base"]),
        Evaluator(digits.subset(range(100)), tiny_spec).data_key(None, weights["base"]),
    ]
    assert len({key, *others}) == 4


def test_mistakes_are_told(tiny_spec, digits, weights):
    from dataclasses import replace

    two = Evaluator({"a": digits, "b": digits}, tiny_spec)
    with pytest.raises(SelectionError, match="say which split: a, b"):
        two.score(weights["base"])
    with pytest.raises(SelectionError, match="there is no split 'c'; there are a, b"):
        two.score(weights["base"], "c")
    unlabelled = replace(digits, labels=np.full(len(digits), -1))
    with pytest.raises(DataError, match="has images without a class"):
        Evaluator(unlabelled, tiny_spec).score(weights["base"])
    with pytest.raises(ModelError, match="no model is named"):
        Evaluator(digits).score(weights["base"])
    nan = from_state_dict({k: v * float("nan") for k, v in weights["base"].state_dict().items()})
    with pytest.raises(NonFiniteError):
        Evaluator(digits, tiny_spec).score(nan)


def test_checkpoints_are_scored_by_one_call(tiny_spec, digits, tiny_checkpoints, weights):
    paths = [tiny_checkpoints["ft0"], str(tiny_checkpoints["ft1"])]
    scores = score(paths, {"id": digits, "more": "digits#val"}, model=tiny_spec, batch_size=50)
    assert {name: list(row) for name, row in scores.items()} == {n: ["id", "more"] for n in ("ft0", "ft1")}
    assert scores["ft0"]["id"].to_json() == Evaluator(digits, tiny_spec).score(weights["ft0"]).to_json()
    assert list(score(weights["ft0"], digits, model=tiny_spec)["ft0"]) == ["val"]


def test_the_splits_come_first_and_the_older_order_is_understood(tiny_spec, digits, weights):
    own, older = Evaluator(digits, tiny_spec), Evaluator(tiny_spec, digits)
    assert older.score(weights["ft0"]).to_json() == own.score(weights["ft0"]).to_json()
    with pytest.raises(
        SelectionError, match=r"is no split\nhint: Evaluator\(cm.open_split\(DATA\), model=…\)"
    ):
        Evaluator("digits", tiny_spec)
