"""LoRA adapters over a base, against peft's own merge_and_unload."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipmerge
from clipmerge.checkpoint.adapters import factors_of
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.read import Reader
from clipmerge.errors import CheckpointError, MismatchError, RecipeError
from clipmerge.weights.check import check, left_alone
from clipmerge.weights.digest import content_digest
from clipmerge.weights.look import inspect
from clipmerge.weights.methods import METHODS, apply
from clipmerge.weights.parse import parse
from clipmerge.weights.plan import make_plan
from clipmerge.weights.verify import verify
from clipmerge.weights.weights import Weights, load, mean, ties

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Train = Callable[..., tuple[Path, dict[str, Any]]]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "hidden_size": 8, "vocab_size": 60, "max_position_embeddings": 10, "eos_token_id": 1}


def hugging_face() -> Any:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config)


def open_clip_model() -> Any:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    return CLIP(12, vision, {"context_length": 10, "vocab_size": 60, "width": 8, "heads": 2, "layers": 2})


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a model as its own library does."""

    def write(model: Any) -> Path:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(tmp_path / "base")
        else:
            (tmp_path / "base").mkdir(exist_ok=True)
            torch.save(model.state_dict(), tmp_path / "base" / "base.pt")
        return tmp_path / "base"

    return write


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Adapt a model with random factors: (the folder that peft wrote, peft's merged state dict)."""

    def make(model: Any, name: str = "lora", /, seed: int = 1, part: str = "", **config: Any) -> Any:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = model.get_submodule(part)
            wrapped = peft.get_peft_model(adapted, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **config}))
            with torch.no_grad():
                for key, parameter in wrapped.named_parameters():
                    if "lora_" in key:
                        parameter.copy_(0.1 * torch.randn(parameter.shape))
            wrapped.save_pretrained(tmp_path / name)
            merged = wrapped.merge_and_unload()
        if part:
            model.set_submodule(part, merged)
        return tmp_path / name, (model if part else merged).state_dict()

    return make


def in_open_clips_names(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A merged state dict as our own (separately tested) reader of whole models names it."""
    torch.save(dict(state), folder / "merged.pt")
    return clipmerge.load(folder / "merged.pt").state_dict()


def agree(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-7, msg=name)


EVERY = [
    "q_proj",
    "v_proj",
    "fc1",
    "patch_embedding",
    "visual_projection",
    "token_embedding",
    "position_embedding",
]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": EVERY, "r": 3, "lora_alpha": 5},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "use_rslora": True, "r": 4},
        {"target_modules": ["q_proj", "fc2"], "rank_pattern": {"fc2": 4, r"vision_model.*\.q_proj": 3},
         "alpha_pattern": {"layers.0.mlp.fc2": 32}},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
    ],
    ids=["q-v", "every-kind-of-layer", "rslora", "patterns", "one-layer", "orthogonal"],
)  # fmt: skip
def test_hugging_faces_adapters_are_merged_as_peft_does(
    train: Train, base_of: Callable[[Any], Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    base = load(base_of(hugging_face()))
    folder, merged = train(hugging_face(), **config)
    lora = load(folder, base=base)
    expected = in_open_clips_names(merged, tmp_path)
    agree(lora.state_dict(), expected)
    start = base.state_dict()
    half = {n: start[n] + 0.5 * (t - start[n]) for n, t in expected.items()}
    agree(parse("base + 0.5*(lora - base)", {"base": base, "lora": lora}).state_dict(), half)
    moved = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert sorted(open_checkpoint(folder).tensors) == moved


@pytest.mark.parametrize("targets", [["attn"], ["attn", "c_fc", "c_proj", "conv1", "token_embedding"]])
def test_open_clips_adapters_are_merged_as_peft_does(
    train: Train, base_of: Callable[[Any], Path], targets: list[str]
) -> None:
    base = load(base_of(open_clip_model()))
    folder, merged = train(open_clip_model(), target_modules=targets)
    agree(load(folder, base=base).state_dict(), {name: merged[name] for name in base.names})


@pytest.mark.parametrize(
    ("make", "part", "targets"),
    [
        (hugging_face, "vision_model", ["q_proj"]),  # as FusionBench's pools
        (hugging_face, "text_model", ["q_proj", "token_embedding"]),
        (open_clip_model, "visual", ["attn", "c_fc"]),
    ],
)
def test_a_tower_adapted_by_itself(
    train: Train,
    base_of: Callable[[Any], Path],
    tmp_path: Path,
    make: Callable[[], Any],
    part: str,
    targets: list[str],
) -> None:
    base = load(base_of(make()))
    folder, merged = train(make(), part=part, target_modules=targets)
    expected = in_open_clips_names(merged, tmp_path)
    agree(load(folder, base=base).state_dict(), {name: expected[name] for name in base.names})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    if make is hugging_face:
        with pytest.raises(CheckpointError, match="does not say whether it adapts the image tower"):
            load(folder, base=base)
    else:  # taken for the text tower's, which is narrower
        with pytest.raises(MismatchError):
            check(load(folder, base=base))


def test_fan_in_fan_out_transposes(train: Train, base_of: Callable[[Any], Path]) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        conv = transformers.pytorch_utils.Conv1D(6, 4)
        return torch.nn.ModuleDict({"visual": torch.nn.ModuleDict({"c_fc": conv})})

    base = load(base_of(model()))
    folder, merged = train(model(), target_modules=["c_fc"], fan_in_fan_out=True)
    agree(load(folder, base=base).state_dict(), merged)


@pytest.fixture
def two(train: Train, base_of: Callable[[Any], Path], tmp_path: Path) -> dict[str, Any]:
    """A base, two adapters of different rank and layers over it, and what peft makes of each."""
    base = load(base_of(hugging_face()))
    first, one = train(hugging_face(), "one", target_modules=["q_proj", "v_proj"])
    second, other = train(hugging_face(), "two", seed=2, r=5, target_modules=["q_proj", "fc1"])
    merged = [in_open_clips_names(state, tmp_path) for state in (one, other)]
    loaded = clipmerge.load_all([first, second], base=base)
    return {"base": base, "folders": (first, second), "loras": loaded, "merged": merged}


def test_soups_and_task_arithmetic_of_adapters(two: dict[str, Any], tmp_path: Path) -> None:
    base, (one, other), (a, b) = two["base"], two["loras"], two["merged"]
    start = base.state_dict()
    soup = mean([one, other])
    agree(soup.state_dict(), {n: (a[n].double() + b[n]).div(2).float() for n in a})
    both = base + 0.4 * ((one - base) + (other - base))
    agree(both.state_dict(), {n: start[n] + 0.4 * (a[n] + b[n] - 2 * start[n]) for n in a})
    # A nonlinear method sees the same vectors as those of whole models.
    whole = [clipmerge.from_state_dict(state, name) for state, name in ((a, "a"), (b, "b"))]
    expected = (base + ties([w - base for w in whole], density=0.2)).state_dict()
    agree((base + ties([one - base, other - base], density=0.2)).state_dict(), expected)
    assert sum(make_plan(soup).steps[n].checkpoints.count(base.checkpoints[0]) for n in a) == len(a)
    assert left_alone(soup) == ["one, two are LoRA adapters over base"]


@pytest.mark.parametrize("method", ["tsv", "gram", "iso_c"])
def test_adapters_are_merged_in_their_core_space(two: dict[str, Any], tmp_path: Path, method: str) -> None:
    """As the paper does it over the factors: U = orth([B …]), V = orth([A; …]), M_t = s·UᵀB·AV, and back."""
    base, (one, other) = two["base"], two["loras"]
    merged = base + apply(method, [one - base, other - base], space="core")
    name, rows = "visual.transformer.resblocks.1.attn.in_proj_weight", slice(0, 16)
    with Reader() as reader:
        products = [factors_of(open_checkpoint(f).tensors[name])[0].product for f in two["folders"]]
        pairs = [reader.factors(product) for product in products]  # the scale is in B
    left = np.linalg.svd(np.hstack([b for b, _ in pairs]), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack([a for _, a in pairs]), full_matrices=False)[2].T
    small = [(left.T @ b) @ (a @ right) for b, a in pairs]
    options = {key: option.default for key, option in METHODS[method].options.items()}
    update = left @ METHODS[method].function(*small, **options) @ right.T
    got = merged.state_dict()[name][rows] - base.state_dict()[name][rows]
    np.testing.assert_allclose(got, update, atol=2e-6 * np.abs(update).max() + 2e-7)
    path = merged.save(tmp_path / "merged.safetensors")
    assert verify(path, tmp_path).status == "verified"


def test_files_made_of_adapters_are_verified(two: dict[str, Any], tmp_path: Path) -> None:
    base, (one, other) = two["base"], two["loras"]
    for number, weights in enumerate((one, mean([one, other]), base + 0.3 * (one - base), one - base)):
        path = weights.save(tmp_path / f"{number}.safetensors")
        assert verify(path, tmp_path).status == "verified"
        assert repr(parse(repr(weights), {c.name: Weights.of(c) for c in weights.checkpoints})) == repr(
            weights
        )
    assert repr(one - base) == "vector(one)"
    saved = load(tmp_path / "3.safetensors")
    assert saved.kind() == 0
    agree((base + saved).state_dict(), two["merged"][0])
    config = two["folders"][0] / "adapter_config.json"
    before = content_digest(open_checkpoint(two["folders"][0]))
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    assert content_digest(open_checkpoint(two["folders"][0])) != before
    assert verify(tmp_path / "0.safetensors", tmp_path).status == "missing"


def test_the_same_bytes_in_any_blocks(two: dict[str, Any]) -> None:
    tensor = two["loras"][0].checkpoints[1].tensors["visual.transformer.resblocks.0.attn.in_proj_weight"]
    with Reader() as reader:
        whole = reader.dense(tensor)
        for size in (1, 5, 16, 100, 768):
            blocks = [block.copy() for _, block in reader.blocks(tensor, size)]
            assert np.concatenate(blocks).tobytes() == whole.tobytes()


def test_the_factors_stay_within_reach(two: dict[str, Any]) -> None:
    adapter = open_checkpoint(two["folders"][0])
    tensor = adapter.tensors["visual.transformer.resblocks.1.attn.in_proj_weight"]
    query, value = factors_of(tensor)
    assert (query.rows, value.rows) == (slice(0, 16), slice(32, 48))  # k is not adapted
    assert (query.product.b.shape, query.product.a.shape, query.product.scale) == ((16, 2), (2, 16), 3.0)
    with Reader() as reader:
        dense = reader.dense(tensor)
        for each in (query, value):
            b, a = reader.factors(each.product)
            np.testing.assert_allclose(dense[each.rows], b @ a, rtol=0, atol=1e-7)
        assert not dense[16:32].any()
    assert factors_of(two["base"].checkpoints[0].tensors["visual.proj"]) == ()


def test_an_adapter_asks_for_its_base(train: Train, base_of: Callable[[Any], Path]) -> None:
    base = base_of(hugging_face())
    folder, _ = train(hugging_face(), target_modules=["q_proj"])
    with pytest.raises(RecipeError, match="is a LoRA adapter: say which model it was trained from"):
        load(folder)
    assert load(folder, vector=True).kind() == 0
    assert inspect(folder).kind == "a LoRA adapter"
    path = folder / "adapter_config.json"
    for named, hint in (("openai/clip-vit-base-patch32", "hf-hub:openai/clip"), (str(base), None)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
        if hint:
            with pytest.raises(RecipeError) as refused:
                load(folder)
            assert hint in (refused.value.hint or "")
    assert repr(load(folder)) == "base + vector(lora)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\)"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, r"biases \(lora_bias\)"),
        ({"modules_to_save": ["visual_projection"]}, r"modules_to_save = .*visual_projection"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changed the base"),
        ({"init_lora_weights": "olora"}, "which changed the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"a_later_invention": 3}, "a_later_invention = '3'"),
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        ({"r": 3}, "the rank 3, its factors have 2"),
        ({"r": "2"}, "are not numbers"),
        ({"rank_pattern": {"(a+)+b": 2}}, "a pattern that is not read"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
    ],
)
def test_more_than_a_plain_lora_is_refused_by_name(
    train: Train, config: dict[str, Any], message: str
) -> None:
    folder, _ = train(hugging_face(), target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(folder)
    assert "merge_and_unload" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: {f"{name}_magnitude_vector": t.clone() for name, t in held.items()} | held,
            "more than a LoRA's two",
        ),
        (lambda held: {n: t for n, t in held.items() if "lora_A" in n}, "one factor of .* without the other"),
        (lambda held: {n: t[:1] if "lora_A" in n else t for n, t in held.items()}, "do not fit"),
        (
            lambda held: {
                n: torch.ones((2, 1 << 17) if "_A" in n else (1 << 17, 2)).half() for n in list(held)[:2]
            },
            "do not fit",
        ),  # a product of 17 billion elements, of a file of 1 MB
        (lambda held: {f"{'x.' * 300}{n}": t for n, t in held.items()}, "more than a LoRA's two"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    train: Train, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = train(hugging_face(), target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not lie beside it"):
        open_checkpoint(file)


def test_an_adapter_of_another_architecture_is_refused(train: Train, base_of: Callable[[Any], Path]) -> None:
    folder, _ = train(hugging_face(), target_modules=["q_proj"])
    lora = load(folder, base=load(base_of(open_clip_model())))
    check(lora)  # the same sizes
    narrow = {name: torch.zeros(2, 2) for name in lora.names}
    with pytest.raises(MismatchError, match=r"is \[2, 2\] in .* and \[\d+, \d+\] in"):
        check(load(folder, base=clipmerge.from_state_dict(narrow)))
    other = {name.replace("transformer", "trunk"): tensor for name, tensor in narrow.items()}
    with pytest.raises(MismatchError, match=r"lora has 'transformer\.resblocks.*', which model lacks"):
        check(load(folder, base=clipmerge.from_state_dict(other)))


def test_torch_files_and_half_precision(train: Train, base_of: Callable[[Any], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = load(base_of(hugging_face()))
    folder, merged = train(hugging_face(), target_modules=["q_proj"])
    held = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({name: tensor.bfloat16() for name, tensor in held.items()}, folder / "adapter_model.bin")
    expected = in_open_clips_names(merged, tmp_path)
    for name, tensor in load(folder / "adapter_model.bin", base=base).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-3)


def test_hugging_faces_image_tower_over_its_whole_model(
    base_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    """FusionBench's pools: CLIPVisionModel has neither a text tower nor a projection."""
    model = hugging_face()
    base = load(base_of(model))
    tower = transformers.CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(transformers.CLIPVisionModel.from_pretrained(tmp_path / "base").state_dict())
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.01
    tower.save_pretrained(tmp_path / "tuned")
    tuned = load(tmp_path / "tuned")
    start, merged = base.state_dict(), (base + 0.5 * (tuned - base)).state_dict()
    for name, tensor in start.items():
        moved = tensor + 0.005 if name.startswith("visual.") and name != "visual.proj" else tensor
        torch.testing.assert_close(merged[name], moved, rtol=0, atol=1e-6, msg=name)
    assert left_alone(tuned.completed_from(base)) == [
        "tuned has no image projection, text tower or logit scale: kept as in base"
    ]
