"""What each method starts from, what it trains, what it writes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.merge.finetuning.conftest import tensors

from clipmerge.errors import DataError, TrainingError
from clipmerge.finetuning.batches import tokenizer_of, training_prompts
from clipmerge.finetuning.finetune import base_contexts, starting_model
from clipmerge.finetuning.head import linear_probe
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.optimiser import adamw, learning_rate
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, image_features
from clipmerge.weights.weights import load

HEAD = {"classification_head.weight", "classification_head.bias"}
CPU = torch.device("cpu")


def moved(before: Any, after: Any) -> set[str]:
    """Names whose values differ: "image", "text", "scale", "head"."""
    old, new = before.state_dict(), after.state_dict()
    sides = set()
    for name, value in new.items():
        if name not in old or not torch.equal(old[name], value):
            side = {"logit_scale": "scale"}.get(name, "text")
            sides.add("image" if name.startswith("visual.") else "head" if name in HEAD else side)
    return sides


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        ({"method": "flyp"}, {"image", "text", "scale"}),
        ({"method": "flyp", "towers": "image"}, {"image", "scale"}),
        ({"method": "flyp", "towers": "text"}, {"text", "scale"}),
        ({"method": "flyp", "towers": "text", "augment": "crop"}, {"text", "scale"}),
        ({"method": "flyp", "logit_scale": "frozen"}, {"image", "text"}),
        ({"method": "ce", "mixup": 0.5, "label_smoothing": 0.1}, {"image", "head"}),
        ({"method": "ce", "head": "trained"}, {"image", "head"}),
        ({"method": "ce", "head": "frozen"}, {"image"}),
        ({"method": "car-ft", "head": "frozen"}, {"image"}),
        ({"method": "car-ft"}, {"image", "head"}),
        ({"method": "lp-ft"}, {"image", "head"}),
        ({"method": "linear-probe"}, {"head"}),
    ],
)
def test_what_trains(tune: Callable[..., Any], base: Any, options: dict[str, Any], trains: set[str]) -> None:
    tuned = tune(**options)
    assert moved(base, tuned) == trains
    assert set(tuned.names) - set(base.names) == (HEAD if "head" in trains else set())


def test_the_checkpoint_loads_in_open_clip_and_records_its_making(
    tune: Callable[..., Any], tmp_path: Path, tiny_spec: Any
) -> None:
    from clipmerge.model import build_model

    tuned = tune(ema=0.9, clip_grad=1.0, decay="matrices", accumulate=2, precision="bf16", checkpointing=True)
    build_model(tiny_spec).load_state_dict(tuned.state_dict())
    record = tuned.record
    assert record["model"]["name"] == "tiny"
    training = record["training"]
    assert (training["method"], training["lr"], training["ema"], training["step"]) == ("flyp", 1e-3, 0.9, 6)
    assert training["base"][0]["file"] == "base.safetensors"
    assert str(tmp_path) not in str(record)


def test_equal_settings_give_equal_bytes_whatever_the_workers(
    tune: Callable[..., Any], tmp_path: Path
) -> None:
    augment = "crop:0.5+flip+jitter:0.4+gray:0.2+randaugment:2,9"
    for workers in (0, 3):
        tune(f"w{workers}", augment=augment, workers=workers)
    assert (tmp_path / "w0.safetensors").read_bytes() == (tmp_path / "w3.safetensors").read_bytes()
    for workers in (0, 2):
        tune(f"device{workers}", augment="crop:0.5+flip", augment_on="device", workers=workers)
    assert (tmp_path / "device0.safetensors").read_bytes() == (tmp_path / "device2.safetensors").read_bytes()
    tune("other", augment=augment, seed=1)
    assert (tmp_path / "other.safetensors").read_bytes() != (tmp_path / "w0.safetensors").read_bytes()


def test_ce_starts_from_the_zero_shot_head(
    tune: Callable[..., Any], tmp_path: Path, base: Any, train: Any, tiny_spec: Any
) -> None:
    tune(method="ce", start=True)
    started = load(tmp_path / "ft.run/ft.start.safetensors").state_dict()
    assert moved(base, load(tmp_path / "ft.run/ft.start.safetensors")) == {"head"}
    model, spec = starting_model(base, tiny_spec, 0, CPU)
    tokens = training_prompts(model, tokenizer_of(spec), train, None, CPU).tokens
    features = model.encode_text(tokens, normalize=True).view(10, -1, 16)
    expected = model.logit_scale.exp() * torch.nn.functional.normalize(features.mean(1), dim=-1)
    torch.testing.assert_close(started["classification_head.weight"], expected.detach(), rtol=1e-4, atol=1e-5)
    assert not started["classification_head.bias"].any()


def test_contexts_are_normalised_one_by_one(base: Any, train: Any, tiny_spec: Any) -> None:
    """CAR-FT's W[class, context]: each prompt a unit vector, each mean a unit vector, never the whole matrix."""
    model, spec = starting_model(base, tiny_spec, 0, CPU)
    towers = Towers(model, spec.preprocess)
    images = Images(train, None, spec.preprocess, CPU, Settings())
    contexts = base_contexts(
        towers, tokenizer_of(spec), images, Settings(method="car-ft", contexts=["photo", "sketch"])
    )
    for vector, template in zip(contexts.vectors, ["a photo of a {}.", "a sketch of a {}."], strict=True):
        prompts = training_prompts(model, tokenizer_of(spec), train, [template], CPU)
        mean = model.encode_text(prompts.tokens, normalize=True).mean(0)
        torch.testing.assert_close(vector, (mean / mean.norm()).detach(), rtol=1e-4, atol=1e-5)


def test_car_fts_term_keeps_the_bases_contexts(
    tune: Callable[..., Any], base: Any, train: Any, tiny_spec: Any
) -> None:
    """A heavy weight on the term leaves the model closer to the base's context distribution."""

    def distance(tuned: Any) -> float:
        from clipmerge.finetuning.losses import context_divergence

        found = []
        for weights in (base, tuned):
            model, spec = starting_model(weights, tiny_spec, 0, CPU)
            towers = Towers(model, spec.preprocess)
            if weights is base:
                images = Images(train, None, spec.preprocess, CPU, Settings())
                contexts = base_contexts(towers, tokenizer_of(spec), images, Settings())
            pixels = np.stack(
                [np.asarray(train.image(i).resize((16, 16))).transpose(2, 0, 1) for i in range(40)]
            )
            found.append(image_features(towers, pixels, CPU, 40))
        return float(context_divergence(found[1], found[0], contexts.vectors, contexts.scale))

    free, kept = (
        tune("free", method="car-ft", car_weight=0.0, steps=20),
        tune("kept", method="car-ft", car_weight=50.0, steps=20),
    )
    assert distance(kept) < 0.5 * distance(free)


def test_the_head_can_be_shared(tune: Callable[..., Any], tmp_path: Path) -> None:
    """Model recycling: one probed head, kept while different starts are finetuned."""
    head = tune("probe", method="linear-probe")
    tune("ft", method="ce", head=head, start=True)
    shared, started = head.state_dict(), load(tmp_path / "ft.run/ft.start.safetensors").state_dict()
    for name in HEAD:
        assert torch.equal(shared[name], started[name])
    with pytest.raises(TrainingError, match="has no classification_head"):
        tune("none", method="ce", head=tune("flyp"))


def test_a_linear_probe_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    labels = np.arange(60) % 3
    features = centres[torch.from_numpy(labels)] + 0.05 * torch.randn(60, 8, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    weight, bias = linear_probe(features, labels, 4, held_out=(features, labels))
    assert (features @ weight.T + bias).argmax(1).tolist() == labels.tolist()
    weight, bias = linear_probe(features[labels < 2], labels[labels < 2], 2)
    assert (features[labels < 2] @ weight.T + bias).argmax(1).tolist() == labels[labels < 2].tolist()


def test_shots_keep_the_epoch_with_the_best_held_out_loss(
    tune: Callable[..., Any], val: Any, tmp_path: Path
) -> None:
    events: list[Any] = []
    tuned = tune(shots=3, steps=None, epochs=4, val=val, lr=3e-2, on_event=events.append)
    scores = [e for e in events if e["event"] == "score"]
    best = min(scores, key=lambda e: e["loss"])
    assert tuned.record["training"]["step"] == best["step"]
    assert tuned.record["training"]["images"] == 30
    assert (tmp_path / "ft.run/ft.last.safetensors").exists() == (best is not scores[-1])


def test_best_last_and_trajectory(tune: Callable[..., Any], val: Any, tmp_path: Path) -> None:
    events: list[Any] = []
    last = tune(val=val, score_every=2, lr=3e-2, trajectory=3, on_event=events.append)
    assert last.record["training"]["step"] == 6
    assert sorted(p.name for p in tmp_path.glob("ft.run/ft.step*")) == [
        "ft.step000002.safetensors",
        "ft.step000004.safetensors",
    ]
    scores = {e["step"]: e["top1"] for e in events if e["event"] == "score"}
    best = max(scores, key=lambda step: (scores[step], -step))
    if best != 6:
        assert load(tmp_path / "ft.run/ft.best.safetensors").record["training"]["step"] == best


def test_held_out_scores_are_the_evaluators(tune: Callable[..., Any], val: Any) -> None:
    from clipmerge.evaluate.evaluator import Evaluator

    for method in ("flyp", "ce"):
        tuned = tune(method, method=method, val=val)
        assert tuned.record["training"]["scores"]["top1"] == pytest.approx(Evaluator(val).score(tuned).value)


def test_from_scratch_and_from_captions(tune: Callable[..., Any], train: Any) -> None:
    from dataclasses import replace

    texts = tuple(f"the digit {label}" for label in train.labels)
    captioned = replace(train, classes=(), labels=np.full(len(train), -1), captions=texts)
    tuned = tune(base=None, train=captioned, multi_positive=True)
    assert "logit_scale" in tuned.names


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, peak=2.0, warmup=4, steps=12) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)


def test_decay_of_matrices_leaves_out_gains_biases_and_logit_scale() -> None:
    trained = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2))}
    assert [g["weight_decay"] for g in adamw(trained, lr=1.0, wd=0.1).param_groups] == [0.1]
    groups = adamw(trained, lr=1.0, wd=0.1, decay="matrices").param_groups
    assert [(g["weight_decay"], g["params"][0] is trained["w"]) for g in groups] == [
        (0.1, True),
        (0.0, False),
    ]


def test_prompt_features_come_back_in_order(base: Any, train: Any, tiny_spec: Any) -> None:
    model, spec = starting_model(base, tiny_spec, 0, CPU)
    templates = ["a {}", "a rather long prompt about the digit {}"]
    prompts = training_prompts(model, tokenizer_of(spec), train, templates, CPU)
    with torch.no_grad():
        expected = model.encode_text(prompts.tokens, normalize=True)
    found = Towers(model, spec.preprocess).prompt_features(prompts.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"channels_last": True}, {"logit_scale": "clamped"}]
)
def test_other_ways_to_compute_the_same(tune: Callable[..., Any], options: dict[str, Any]) -> None:
    plain, other = tune("plain", lr=1e-5).state_dict(), tune("other", lr=1e-5, **options).state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-4)


def test_tensorboard_gets_the_same_events(tune: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tune(tensorboard=tmp_path / "board")
    assert next((tmp_path / "board").glob("events.*")).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "flip"}, "method cannot be 'flip'"),
        ({"learning_rate": 1.0}, "learning_rate is no hyperparameter"),
        ({"label_smoothing": 1.5}, "label_smoothing cannot be 1.5"),
        ({"method": "ce", "towers": "text"}, "ce trains a head over images"),
        ({"mixup": 0.2}, "flyp has no label to mix"),
        ({"method": "ce", "chunk": 4}, "ce has no contrastive batch"),
        ({"epochs": 2}, "both epochs and steps"),
        ({"ema": 1.0}, "cannot decay by 1.0"),
        ({"select": "best"}, "nothing says which checkpoint is best"),
        ({"augment": "crop+upside-down"}, "'upside-down' is no augmentation"),
        ({"augment": {"auto_augment": "x"}}, "auto_augment, which is timm's"),
        ({"base": None, "model": None}, "needs to know the model"),
        ({"accumulate": 100}, "cannot fill 100 batches"),
        ({"method": "ce", "logit_scale": "frozen"}, "--logit-scale does nothing here: a trained head holds"),
        (
            {"method": "ce", "head": "frozen", "logit_scale": "clamped"},
            "the frozen head keeps the base's scale",
        ),
        ({"method": "ce", "car_weight": 2.0}, "--car-weight does nothing here: ce keeps no contexts"),
        ({"contexts": ["photo"]}, "--contexts does nothing here"),
        (
            {"method": "linear-probe", "clip_grad": 1.0},
            "--clip-grad does nothing here: linear-probe takes no steps",
        ),
        ({"augment_on": "device"}, "--augment-on does nothing here: nothing is augmented"),
        ({"freeze_batch_norm": True}, "the model has no BatchNorm"),
        ({"score_every": 2}, "--score-every does nothing without held-out images"),
        ({"method": "lp-ft", "head": "frozen"}, "lp-ft has no frozen head"),
        ({"head": "frozen"}, "flyp has no frozen head"),
        (
            {"method": "ce", "head": "x.safetensors", "frozen_head": True},
            "a frozen head is the base's zero-shot head",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tune: Callable[..., Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        tune(**options)


def test_images_without_labels_are_refused(tune: Callable[..., Any], train: Any, val: Any) -> None:
    from dataclasses import replace

    bare = replace(train, labels=np.full(len(train), -1))
    with pytest.raises(DataError, match="images without a label"):
        tune(train=bare)
    with pytest.raises(DataError, match="cannot score"):
        tune(val=replace(val, labels=np.full(len(val), -1)))
    captioned = replace(val, classes=(), captions=val.names)
    with pytest.raises(DataError, match="has captions and no classes, by which finetuning scores") as refusal:
        tune(val=captioned)
    assert f"clipmerge evaluate FILE --data {val.source}" in str(refusal.value.hint)
    with pytest.raises(DataError, match="other classes than"):
        tune(method="ce", val=replace(val, classes=tuple("abcdefghij")))


def test_training_goes_on_with_the_prompts_that_its_base_records(
    tune: Callable[..., Any], train: Any, val: Any
) -> None:
    """A head or a contrast built from other prompts than the base's own would start from a worse model, in silence."""
    names = tuple(f"number {name}" for name in train.classes)
    once = tune("once", train=replace(train, classes=names, words=train.classes), templates=["a digit: {}"])
    again = tune("again", base=once, val=val, method="ce")
    (entry,) = again.prompts
    assert entry == {"templates": ["a digit: {}"], "classes": list(names), "words": list(train.classes)}
    typed = tune(
        "typed",
        base=once,
        method="ce",
        train=replace(train, classes=names, words=train.classes),
        templates=["a digit: {}"],
    )
    assert tensors(again).keys() == tensors(typed).keys()
    assert all(np.array_equal(tensors(again)[name], tensors(typed)[name]) for name in tensors(typed))

    (entry,) = tune("given", base=once, templates=["a photo of {}"]).prompts
    assert entry["templates"] == ["a photo of {}"]
    (entry,) = tune(
        "the-datas", base=once, train=replace(train, templates=("{}",), given=frozenset({"templates"}))
    ).prompts
    assert entry["templates"] == ["{}"]
