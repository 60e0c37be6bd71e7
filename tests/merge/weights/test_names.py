"""Towers, blocks and patterns, on the names of open_clip's real models."""

import pytest

from clipmerge.weights.names import block_of, depths_of, matches, matrices_of, tower_of


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


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("visual.conv1.weight", (768, 3, 32, 32), 0),
        ("visual.class_embedding", (768,), 0),
        ("visual.positional_embedding", (50, 768), 1),
        ("visual.proj", (768, 512), 1),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (2304, 768), 3),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", (2304,), 0),
        ("visual.transformer.resblocks.0.attn.out_proj.weight", (768, 768), 1),
        ("visual.transformer.resblocks.0.mlp.c_proj.weight", (768, 3072), 1),
        ("transformer.resblocks.11.attn.in_proj_weight", (1536, 512), 3),
        ("token_embedding.weight", (49408, 512), 1),
        ("text_projection", (512, 512), 0),
        ("logit_scale", (), 0),
        # ResNet
        ("visual.layer1.0.conv1.weight", (64, 64, 1, 1), 0),
        ("visual.attnpool.q_proj.weight", (2048, 2048), 1),
        ("visual.attnpool.positional_embedding", (50, 2048), 1),
        # CustomTextCLIP
        ("text.transformer.resblocks.0.attn.in_proj_weight", (1536, 512), 3),
        ("text.text_projection", (512, 512), 0),
        # SigLIP: timm's trunk, a text tower with a linear projection
        ("visual.trunk.pos_embed", (1, 196, 768), 0),
        ("visual.trunk.blocks.0.attn.qkv.weight", (2304, 768), 3),
        ("visual.trunk.attn_pool.kv.weight", (1536, 768), 2),
        ("visual.trunk.attn_pool.q.weight", (768, 768), 1),
        ("visual.trunk.attn_pool.latent", (1, 1, 768), 0),
        ("text.text_projection.weight", (768, 768), 0),
        ("classification_head.weight", (10, 512), 1),
    ],
)
def test_what_is_a_matrix(name: str, shape: tuple[int, ...], parts: int) -> None:
    assert matrices_of(name, shape) == parts
    assert matrices_of(name, shape, fused=True) == min(parts, 1)


def test_depth_is_counted_in_each_tower() -> None:
    names = [f"visual.transformer.resblocks.{i}.ln_1.weight" for i in range(5)]
    names += [f"transformer.resblocks.{i}.x" for i in range(2)]
    depths = depths_of([*names, "visual.proj", "logit_scale"])
    assert [depths[name] for name in names] == [0, 0.25, 0.5, 0.75, 1, 0, 1]
    assert depths.keys() == set(names)
    assert depths_of([f"visual.layer{i}.0.bn1.weight" for i in (1, 2, 3)]) == {
        f"visual.layer{i}.0.bn1.weight": (i - 1) / 2 for i in (1, 2, 3)
    }
    assert depths_of(["visual.layers.0.x"]) == {"visual.layers.0.x": 0.0}
