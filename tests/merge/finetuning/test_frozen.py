"""What is frozen: a tower in eval mode, the zero-shot head, BatchNorm's statistics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clipmerge.finetuning.finetune as finetuning
from clipmerge.data.pixels import mean_and_std, pixels
from clipmerge.errors import TrainingError
from clipmerge.finetuning.batches import tokenizer_of, training_prompts
from clipmerge.finetuning.settings import Settings
from clipmerge.model import build_model, resolve_model
from clipmerge.weights.weights import from_state_dict

CPU = torch.device("cpu")


class Watched:
    """`starting_model`, with every later call of a part of the model noted: its name, and whether it was training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.plain = finetuning.starting_model
        monkeypatch.setattr(finetuning, "starting_model", self)

    def note(self, name: str, part: nn.Module) -> None:
        self.calls.append((name, part.training))

    def __call__(self, *arguments: Any) -> Any:
        net, spec = self.plain(*arguments)
        net.train()  # whatever mode it came in
        for name, part in net.named_modules():
            if name.startswith(("visual", "transformer")):
                part.register_forward_pre_hook(lambda part, _, name=name: self.note(name, part))
        return net, spec


FROZEN: list[tuple[dict[str, Any], str]] = [
    ({"method": "ce"}, "text"),
    ({"method": "ce", "head": "frozen", "augment": "crop"}, "text"),
    ({"method": "car-ft", "augment": "crop"}, "text"),
    ({"method": "lp-ft"}, "text"),
    ({"method": "linear-probe"}, "both"),
    ({"towers": "image"}, "text"),
    ({"towers": "image", "chunk": 8, "augment": "crop"}, "text"),
    ({"towers": "text"}, "image"),
    ({"towers": "text", "chunk": 8, "augment": "crop"}, "image"),
]


@pytest.mark.parametrize(("options", "frozen"), FROZEN)
def test_what_does_not_train_is_in_eval_mode_from_the_first_feature_on(
    tune: Callable[..., Any], val: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], frozen: str
) -> None:
    watched = Watched(monkeypatch)
    scored = {} if options.get("method") == "linear-probe" else {"score_every": 2}
    tune(val=val, **scored, **options)
    trained = {"text" if name.startswith("transformer") else "image" for name, on in watched.calls if on}
    called = {"text" if name.startswith("transformer") else "image" for name, _ in watched.calls}
    assert called == ({"image"} if options.get("method") in ("lp-ft", "linear-probe") else {"image", "text"})
    assert trained == {"image": {"text"}, "text": {"image"}, "both": set()}[frozen]


@pytest.mark.parametrize(
    "options",
    [{"method": "ce", "head": "frozen"}, {"method": "car-ft"}, {"method": "lp-ft"}, {"towers": "image"}],
)
def test_dropout_of_a_frozen_text_tower_changes_nothing(
    tune: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    """A Hugging Face text tower, whose configuration has dropout: two values of it, the same trained weights."""
    transformers = pytest.importorskip("transformers")
    made = []
    for i, dropout in enumerate((0.0, 0.5)):
        folder = tmp_path / f"text{i}"
        transformers.BertConfig(
            vocab_size=49408, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        ).save_pretrained(folder)  # fmt: skip
        vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
        text = {"hf_model_name": str(folder), "hf_pooler_type": "mean_pooler", "hf_proj_type": None,
                "context_length": 32}  # fmt: skip
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps({"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}))
        tuned = tune(f"ft{i}", base=None, model=resolve_model(path), steps=2, **options)
        made.append(tuned.state_dict())
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name


def test_cross_entropy_under_a_frozen_head_step_by_step(
    tune: Callable[..., Any], base: Any, train: Any, tiny_spec: Any
) -> None:
    """PAINT's and task arithmetic's finetuning, written out: zero-shot head, fixed scale, clipped, AdamW."""
    tuned = tune(
        method="ce", head="frozen", lr=1e-2, batch_size=60, steps=4, warmup=0, label_smoothing=0.1, wd=0.1
    )
    net: Any = build_model(tiny_spec)
    net.load_state_dict(base.state_dict())
    tokens = training_prompts(net, tokenizer_of(tiny_spec), train, None, CPU).tokens
    with torch.no_grad():
        text = F.normalize(net.encode_text(tokens), dim=-1).view(10, -1, 16).mean(1)
        head = net.logit_scale.exp() * F.normalize(text, dim=-1)
    mean, std = mean_and_std(tiny_spec.preprocess, "cpu")
    images = (torch.from_numpy(pixels(train, tiny_spec.preprocess)).float() / 255 - mean) / std
    labels = torch.from_numpy(train.labels)
    parameters = list(net.visual.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    norms = []
    for step in range(4):
        optimiser.param_groups[0]["lr"] = (
            0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) * 1e-2
        )
        logits = F.normalize(net.encode_image(images), dim=-1) @ head.T
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimiser.step()
    assert max(norms) > 1  # clipping did something
    ours = tuned.state_dict()
    assert "classification_head.weight" not in ours
    for name, value in net.state_dict().items():
        # Attention ignores a bias of all keys: its gradient is rounding, which Adam makes a step of up to lr.
        noise = 4e-2 if name.endswith("in_proj_bias") else 1e-4
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=noise)
    training = tuned.record["training"]
    assert (training["frozen_head"], training["clip_grad"]) == (True, 1.0)
    free = tune(
        "free", method="ce", head="frozen", lr=1e-2, batch_size=60, steps=4, warmup=0, wd=0.1, clip_grad=0
    )
    assert free.record["training"]["clip_grad"] == 0
    assert not torch.equal(free.state_dict()["visual.proj"], ours["visual.proj"])


def test_one_softmax_over_the_prompts_of_several_sets(
    tune: Callable[..., Any], base: Any, train: Any, tiny_spec: Any
) -> None:
    """The first step, written out: every image of both sets against the twenty classes of both."""
    from dataclasses import replace

    other = replace(
        train.subset(range(20)), source="other", templates=("upside down {}", "{} on its head", "a {}")
    )
    options = {
        "method": "ce",
        "head": "frozen",
        "lr": 1e-2,
        "batch_size": 80,
        "steps": 1,
        "warmup": 0,
        "wd": 0.0,
    }
    tuned = tune(train={"plain": train, "turned": other}, val={"a": train, "b": other}, **options)
    net: Any = build_model(tiny_spec)
    net.load_state_dict(base.state_dict())
    heads = []
    for split in (train, other):
        tokens = training_prompts(net, tokenizer_of(tiny_spec), split, None, CPU).tokens
        with torch.no_grad():
            texts = F.normalize(net.encode_text(tokens), dim=-1).view(10, -1, 16).mean(1)
            heads.append(net.logit_scale.exp() * F.normalize(texts, dim=-1))
    mean, std = mean_and_std(tiny_spec.preprocess, "cpu")
    images = torch.cat([torch.from_numpy(pixels(split, tiny_spec.preprocess)) for split in (train, other)])
    labels = torch.cat([torch.from_numpy(train.labels), torch.from_numpy(other.labels) + 10])
    logits = F.normalize(net.encode_image((images.float() / 255 - mean) / std), dim=-1) @ torch.cat(heads).T
    F.cross_entropy(logits, labels).backward()
    nn.utils.clip_grad_norm_(list(net.visual.parameters()), 1.0)
    torch.optim.AdamW(net.visual.parameters(), lr=1e-2, weight_decay=0.0).step()
    torch.testing.assert_close(
        tuned.state_dict()["visual.proj"], net.visual.proj.detach(), rtol=1e-3, atol=1e-4
    )
    training = tuned.record["training"]
    assert training["sets"] == {"plain": 60, "turned": 20}
    scores = training["scores"]
    assert scores["top1"] == pytest.approx((scores["a top1"] + scores["b top1"]) / 2)
    assert [entry["templates"] for entry in tuned.prompts] == [list(train.templates), list(other.templates)]
    flyp = tune("flyp", train={"plain": train, "turned": other}, shares="root")
    assert flyp.record["training"]["shares"] == "root"
    with pytest.raises(TrainingError, match="trains one head, and several sets have theirs"):
        tune("ce", train={"plain": train, "turned": other}, method="ce")
    with pytest.raises(TrainingError, match="--shares does nothing with one set"):
        tune("one", shares="root")


def test_a_frozen_head_scores_other_classes_as_well(tune: Callable[..., Any], val: Any) -> None:
    from dataclasses import replace

    letters = replace(val, classes=tuple("abcdefghij"))
    tuned = tune(method="ce", head="frozen", val=letters)
    assert 0 <= tuned.record["training"]["scores"]["top1"] <= 1


def test_batch_norms_statistics_can_stay_as_they_are(tune: Callable[..., Any], resnet_spec: Any) -> None:
    before = build_model(resnet_spec, seed=0).state_dict()
    statistics = [
        name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert statistics
    start, made = from_state_dict(before), {}
    options = {"base": start, "model": resnet_spec, "method": "ce", "head": "frozen", "steps": 2}
    for freeze in (True, False, None):
        tuned = tune(f"{freeze}", freeze_batch_norm=freeze, **options)
        made[freeze] = tuned.state_dict()
        assert tuned.record["training"]["freeze_batch_norm"] is (freeze is not False)
    assert all(torch.equal(before[name], made[True][name]) for name in statistics)
    assert not any(torch.equal(before[name], made[False][name]) for name in statistics)
    assert all(torch.equal(value, made[None][name]) for name, value in made[True].items())
    assert not torch.equal(before["visual.bn1.weight"], made[True]["visual.bn1.weight"])


def test_statistics_that_nobody_took_are_not_kept(resnet_spec: Any, tiny_spec: Any) -> None:
    resnet, vit = build_model(resnet_spec), build_model(tiny_spec)
    for scratch in (True, False):
        settings = finetuning.with_defaults(Settings(), resnet, from_scratch=scratch)
        assert settings.freeze_batch_norm is not scratch
        assert finetuning.with_defaults(Settings(), vit, from_scratch=scratch).freeze_batch_norm is None
    with pytest.raises(TrainingError, match="of which BatchNorm would take statistics"):
        finetuning.with_defaults(Settings(chunk=8), resnet, from_scratch=True)
    assert finetuning.with_defaults(Settings(chunk=8), resnet, from_scratch=False).freeze_batch_norm
    with pytest.raises(TrainingError, match="has no BatchNorm"):
        finetuning.with_defaults(Settings(freeze_batch_norm=False), vit, from_scratch=False)
