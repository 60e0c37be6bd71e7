"""Prompts through the text tower: exact, whatever is left out."""

import copy

import numpy as np
import open_clip
import pytest
import torch

from clipmerge.evaluate import heads
from clipmerge.model import ModelSpec, build_model, get_tokenizer

PROMPTS = [
    "a dog",
    "a photo of a cat.",
    "",
    "a bad photo of the very large and rather unusual animal that nobody has ever seen before, really",
    "a dog",
]


def model_of(config, **text):
    config = copy.deepcopy(config)
    custom = text.pop("custom_text", False)
    config["text_cfg"].update(text)
    config["custom_text"] = custom
    spec = ModelSpec("tiny", config, {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3})
    return spec, build_model(spec, seed=1)


VARIANTS = [
    {},
    {"custom_text": True},
    {"custom_text": True, "pool_type": "eos", "eos_id": 49407},
    {"proj_bias": True},
    {"context_length": 9},
]
PLAIN = [
    {"custom_text": True, "no_causal_mask": True},
    {"custom_text": True, "embed_cls": True},
    {"custom_text": True, "pool_type": "last"},
]


@pytest.mark.parametrize("text", VARIANTS + PLAIN, ids=str)
def test_features_and_gradients_are_those_of_the_plain_call(tiny_model_config, text):
    spec, model = model_of(tiny_model_config, **text)
    tokens = get_tokenizer(spec)(PROMPTS)
    for normalize in (True, False):
        plain = model.encode_text(tokens, normalize=normalize)
        cut = heads.encode_text(model, tokens, normalize)
        torch.testing.assert_close(cut, plain, rtol=0, atol=1e-5)
    parameters = [p for n, p in model.named_parameters() if not n.startswith(("visual", "logit"))]
    expected = torch.autograd.grad(plain.square().sum(), parameters, allow_unused=True)
    got = torch.autograd.grad(cut.square().sum(), parameters, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", VARIANTS, ids=str)
def test_the_tower_reads_no_more_than_the_longest_prompt(tiny_model_config, text, monkeypatch):
    spec, model = model_of(tiny_model_config, **text)
    tokens = get_tokenizer(spec)(["a dog", "a photo of a cat."])
    seen = []
    tower = model.text.transformer if hasattr(model, "text") else model.transformer
    tower.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    heads.encode_text(model, tokens)
    assert seen == [8]  # start, a, photo, of, a, cat, full stop, end


def test_without_an_end_of_text_the_plain_rule_decides(tiny_model_config):
    _, model = model_of(tiny_model_config, custom_text=True, pool_type="eos", eos_id=7)
    tokens = torch.randint(100, 200, (3, 32))
    torch.testing.assert_close(heads.encode_text(model, tokens), model.encode_text(tokens, normalize=True))


@pytest.mark.parametrize(
    "text", [{}, {"custom_text": True}, {"custom_text": True, "no_causal_mask": True}], ids=str
)
@pytest.mark.parametrize("batch_size", [2, 256])
def test_prompts_come_back_in_order(tiny_model_config, text, batch_size):
    spec, model = model_of(tiny_model_config, **text)
    tokens = get_tokenizer(spec)(PROMPTS)
    told = []
    got = heads.encode_prompts(model, tokens, batch_size=batch_size, on_progress=lambda *a: told.append(a))
    torch.testing.assert_close(got, model.encode_text(tokens, normalize=True), rtol=0, atol=1e-5)
    assert not got.requires_grad
    assert told[-1] == ("encoding prompts", 4, 4), "the prompt that comes twice is encoded once"


CLASSES = ("cat", "dog", "fire engine")
TEMPLATES = ("a photo of a {}.", "a {} in a {} world", "{}")


def test_the_head_is_open_clips(tiny_model_config):
    spec, model = model_of(tiny_model_config)
    tokenizer = get_tokenizer(spec)
    head = heads.zero_shot_head(model, tokenizer, CLASSES, TEMPLATES)
    texts = [[t.replace("{}", c) for t in TEMPLATES] for c in CLASSES]
    with torch.no_grad():
        rows = [model.encode_text(tokenizer(row), normalize=True).mean(0) for row in texts]
    expected = torch.stack([row / row.norm() for row in rows])
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-5)
    one = ("a photo of a {}.",)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, one)
    torch.testing.assert_close(
        heads.zero_shot_head(model, tokenizer, CLASSES, one), theirs.T, rtol=0, atol=1e-5
    )


def test_a_head_is_kept_by_what_it_is_made_of(tiny_model_config, tmp_path):
    spec, model = model_of(tiny_model_config)
    tokenizer = get_tokenizer(spec)

    def build(model=model, classes=CLASSES, templates=TEMPLATES):
        return heads.zero_shot_head(model, tokenizer, classes, templates, cache=tmp_path)

    def kept():
        return sorted(tmp_path.glob("heads/*"))

    first = build()
    assert len(kept()) == 1
    assert torch.equal(build(), first)
    assert len(kept()) == 1

    with torch.no_grad():
        model.visual.proj += 1
        model.logit_scale += 1
    assert torch.equal(build(), first), "the image tower and the scale are no part of it"
    assert len(kept()) == 1

    build(classes=CLASSES[::-1])
    build(templates=TEMPLATES[:2])
    assert len(kept()) == 3
    quick = build_model(ModelSpec("tiny", {**spec.config, "quick_gelu": True}, spec.preprocess))
    quick.load_state_dict(model.state_dict())
    assert not torch.equal(build(model=quick), first)
    assert len(kept()) == 4
    with torch.no_grad():
        model.ln_final.bias[0] += 1e-3
    assert not torch.equal(build(), first)
    assert len(kept()) == 5


@pytest.mark.parametrize("damage", [b"", b"not an array", None])
def test_a_damaged_head_is_built_anew(tiny_model_config, tmp_path, damage):
    spec, model = model_of(tiny_model_config)
    tokenizer = get_tokenizer(spec)
    first = heads.zero_shot_head(model, tokenizer, CLASSES, TEMPLATES, cache=tmp_path)
    (path,) = tmp_path.glob("heads/*.npy")
    if damage is None:
        np.save(path, np.full((3, 16), np.nan, np.float32))
    else:
        path.write_bytes(damage)
    torch.testing.assert_close(
        heads.zero_shot_head(model, tokenizer, CLASSES, TEMPLATES, cache=tmp_path), first
    )
    assert [p.name for p in tmp_path.glob("heads/*")] == [path.name]
