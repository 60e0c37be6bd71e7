"""Towers, blocks and patterns, on the names of open_clip's real models."""

import pytest

from clipmerge.weights.names import block_of, matches, tower_of


@pytest.mark.parametrize(
    ("name", "tower", "block"),
    [
        ("visual.conv1.weight", "visual", None),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "visual", 11),
        ("visual.trunk.blocks.3.mlp.fc1.weight", "visual", 3),  # timm
        ("visual.layer2.0.conv1.weight", "visual", 2),  # ResNet
        ("visual.trunk.stages.1.blocks.0.conv_dw.weight", "visual", 1),  # ConvNeXt
        ("transformer.resblocks.0.ln_1.weight", "text", 0),
        ("text.transformer.resblocks.7.ln_1.weight", "text", 7),  # CustomTextCLIP
        ("text.transformer.encoder.layer.4.output.dense.weight", "text", 4),  # Hugging Face text towers
        ("token_embedding.weight", "text", None),
        ("positional_embedding", "text", None),
        ("text_projection", "text", None),
        ("ln_final.bias", "text", None),
        ("classification_head.weight", "head", None),
        ("logit_scale", "other", None),
        ("logit_bias", "other", None),
    ],
)
def test_which_tower_and_block(name: str, tower: str, block: int | None) -> None:
    assert tower_of(name) == tower
    assert block_of(name) == block


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("visual", "visual.proj", "visually"),
        ("text", "transformer.resblocks.0.ln_1.weight", "visual.transformer.resblocks.0.ln_1.weight"),
        ("other", "logit_scale", "text_projection"),
        ("head", "classification_head.bias", "visual.head.weight"),
        ("visual.*", "visual.proj", "text.proj"),
        ("*.bias", "ln_final.bias", "ln_final.weight"),
        ("*resblocks.[0-5].*", "visual.transformer.resblocks.3.x", "visual.transformer.resblocks.7.x"),
        ("visual.block[3]", "visual.transformer.resblocks.3.x", "transformer.resblocks.3.x"),
        ("visual.block[3]", "visual.transformer.resblocks.3.x", "visual.transformer.resblocks.30.x"),
        ("visual.block[0:6]", "visual.transformer.resblocks.5.x", "visual.transformer.resblocks.6.x"),
        ("text.block[6:]", "transformer.resblocks.11.x", "transformer.resblocks.5.x"),
        ("text.block[:2]", "transformer.resblocks.1.x", "transformer.resblocks.2.x"),
        ("visual.block[:]", "visual.transformer.resblocks.9.x", "visual.conv1.weight"),
    ],
)
def test_what_a_pattern_picks(pattern: str, yes: str, no: str) -> None:
    assert matches(pattern, yes)
    assert not matches(pattern, no)


def test_patterns_care_about_case() -> None:
    assert not matches("VISUAL.*", "visual.proj")
