"""Statistics of data: against a loop over images by hand, kept beside checkpoints, refused where they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import clipmerge as cm
from clipmerge.data.pixels import mean_and_std, pixels
from clipmerge.errors import ModelError, RecipeError
from clipmerge.weights.parse import parse
from clipmerge_cli.app import main

DATA = "digits#train[:6]"


@pytest.fixture
def pair(tiny_checkpoints: Any, tiny_spec: Any, tmp_path: Path) -> list[Path]:
    """Two checkpoints that know their model, alone in a folder."""
    paths = []
    for name in ("ft0", "ft1"):
        paths.append(tmp_path / f"{name}.safetensors")
        cm.load(tiny_checkpoints[name]).save(paths[-1], metadata={"model": tiny_spec.to_metadata()})
    return paths


def read(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def model_and_images(path: Path) -> tuple[Any, torch.Tensor, Any]:
    spec = cm.resolve_model(None, cm.load(path))
    net: Any = cm.build_model(spec)
    cm.load(path).load_into(net)
    split = cm.open_split(DATA)
    images = torch.from_numpy(pixels(split, spec.preprocess)).float() / 255
    mean, std = mean_and_std(spec.preprocess, "cpu")
    return net.eval(), (images - mean) / std, split


def test_fisher_information_is_the_mean_of_squared_gradients_of_single_images(pair: list[Path]) -> None:
    from open_clip import get_tokenizer

    stored = read(cm.statistics(pair[0], DATA, method="fisher", templates=["a {}."]))
    net, images, split = model_and_images(pair[0])
    tokens = get_tokenizer("ViT-B-32", context_length=32)([f"a {name}." for name in split.classes])
    draw = torch.Generator().manual_seed(0)
    sums: dict[str, torch.Tensor] = {}
    for image in images:
        net.zero_grad()
        head = net.encode_text(tokens, normalize=True)
        logits = net.logit_scale.exp() * net.encode_image(image[None], normalize=True) @ head.T
        answer = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=draw)
        (-logits.log_softmax(-1)[0, answer]).sum().backward()
        for name, parameter in net.named_parameters():
            sums[name] = sums.get(name, torch.zeros(())) + parameter.grad**2 / len(images)
    assert stored.keys() == sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(stored[name], value, rtol=2e-3, atol=1e-4 * float(value.max()) + 1e-12)


def test_gram_matrices_are_those_of_every_layers_inputs(pair: list[Path]) -> None:
    stored = read(cm.statistics(pair[0], DATA, method="regmean", batch_size=4))
    net, images, _ = model_and_images(pair[0])
    with torch.no_grad():
        pooled = net.visual.ln_post(_trunk(net, images))
    seen = {"visual.proj": pooled.T @ pooled}

    def keep(name: str, module: Any) -> None:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[name] = seen.get(name, torch.zeros(())) + rows.T @ rows

        module.register_forward_pre_hook(hook)

    tower = net.visual.transformer.resblocks
    for i, block in enumerate(tower):
        keep(f"visual.transformer.resblocks.{i}.attn.in_proj_weight", block.attn)
        keep(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight", block.mlp.c_fc)
        keep(f"visual.transformer.resblocks.{i}.mlp.c_proj.weight", block.mlp.c_proj)
    with torch.no_grad():
        net.encode_image(images)
    assert seen.keys() <= stored.keys()
    for name, value in seen.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    linear = {n for n, t in net.state_dict().items() if t.ndim == 2 and "embedding" not in n}
    assert stored.keys() == linear  # attention's output projections and the text tower too


def _trunk(net: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the class token before the last norm, by the tower's own parts and attention written out."""
    visual = net.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        attention, y = block.attn, block.ln_1(x)
        q, k, v = (
            F.linear(y, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, 2, 8)).unbind(2)
        )
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5
        mixed = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2)
        x = x + attention.out_proj(mixed)
        x = x + block.mlp(block.ln_2(x))
    return x[:, 0]


def test_an_encoder_without_a_text_tower_has_the_gram_matrices_of_its_image_tower(
    pair: list[Path],
) -> None:
    whole = read(cm.statistics(pair[0], DATA, method="regmean", batch_size=4))
    encoders = []
    for path in pair:
        encoders.append(path.with_name(f"{path.stem}_image.safetensors"))
        assert main(["convert", str(path), "--only", "image", "-o", str(encoders[-1])]) == 0
        assert main(["statistics", str(encoders[-1]), "--method", "regmean", "--data", DATA]) == 0
    stored = read(encoders[0].with_name("ft0_image.regmean.safetensors"))
    assert stored.keys() == {name for name in whole if name.startswith("visual.")}
    for name, value in stored.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)
    cm.statistics(pair[1], DATA, method="regmean")
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    merged, both = (cm.regmean(files).state_dict()[name] for files in (encoders, pair))
    torch.testing.assert_close(merged, both)
    with pytest.raises(ModelError, match="has no text tower, whose prompts the Fisher") as refusal:
        cm.statistics(encoders[0], DATA, method="fisher")
    assert "merge by regmean" in str(refusal.value.hint)


def test_the_attention_that_is_watched_computes_what_torch_does(pair: list[Path]) -> None:
    from clipmerge.evaluate.linear_inputs import LinearInputs

    net, images, _ = model_and_images(pair[0])
    tokens = torch.randint(1, 400, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = net.encode_image(images), net.encode_text(tokens)
        with LinearInputs(net) as inputs:
            watched = net.encode_image(images), net.encode_text(tokens)
    for one, other in zip(plain, watched, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "transformer.resblocks.0.attn.out_proj.weight" in inputs.sums


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_methods_find_statistics_and_verify_computes_them_again(pair: list[Path], method: Any) -> None:
    for path in pair:
        assert cm.statistics(path, DATA, method=method).name == f"{path.stem}.{method}.safetensors"
    names = {path.stem: cm.load(path) for path in pair}
    merged = parse(f"{method}([ft0, ft1])", names).save(pair[0].with_name("merged.safetensors"))
    turned = getattr(cm, method)([names["ft1"], names["ft0"]]).save(pair[0].with_name("turned.safetensors"))
    assert all(torch.equal(tensor, read(turned)[name]) for name, tensor in read(merged).items())
    assert cm.verify(merged).status == "verified"
    tensors, (a, b) = read(merged), map(read, pair)
    (of_a, of_b) = (read(path.with_name(f"{path.stem}.{method}.safetensors")) for path in pair)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    x, y, f, g = (t[name].double().numpy() for t in (a, b, of_a, of_b))
    if method == "fisher":
        known = f + g > 0
        expected = np.where(known, (f * x + g * y) / np.where(known, f + g, 1), (x + y) / 2)
    else:
        f, g = (0.95 * s + 0.05 * np.diag(np.diag(s)) for s in (f, g))
        expected = (x @ f + y @ g) @ np.linalg.inv(f + g)
    assert tensors[name].numpy() == pytest.approx(expected, abs=1e-6)
    rest = "visual.conv1.weight" if method == "regmean" else "token_embedding.weight"
    if method == "regmean":
        assert torch.equal(tensors[rest], (a[rest].double() + b[rest].double()).div(2).float())


def test_what_does_not_fit_is_refused(pair: list[Path]) -> None:
    weights = [cm.load(path) for path in pair]
    with pytest.raises(RecipeError, match=r"no ft0\.fisher\.safetensors beside it") as refusal:
        cm.fisher(weights)
    assert "clipmerge statistics --method fisher" in str(refusal.value.hint)
    files = [cm.statistics(path, DATA, method="fisher") for path in pair]
    with pytest.raises(RecipeError, match="was taken of another checkpoint"):
        cm.fisher(weights, statistics=files[::-1]).state_dict()
    with pytest.raises(RecipeError, match="takes checkpoints, whose statistics were taken"):
        cm.fisher([cm.mean(weights), weights[0]])
    with pytest.raises(RecipeError, match="holds statistics for fisher, not a model"):
        cm.mean([weights[0], cm.load(files[0])]).state_dict()
    with pytest.raises(RecipeError, match="is statistics for fisher, which regmean needs"):
        cm.regmean(weights, statistics=files)
    shutil.copy(pair[1], pair[0])
    with pytest.raises(RecipeError, match="or of what it was before"):
        cm.fisher([cm.load(pair[0]), weights[1]]).state_dict()


def test_the_command_takes_them_and_soups_leave_them_out(pair: list[Path], capsys: Any) -> None:
    files = [str(path) for path in pair]
    assert main(["statistics", *files, "--method", "fisher", "--data", DATA, "--images", "4"]) == 0
    assert "ft1.fisher.safetensors" in capsys.readouterr().err
    folder = pair[0].parent
    every = sorted(str(path) for path in folder.glob("*.safetensors"))
    assert main(["soup", *every, "-o", str(folder / "soup.safetensors"), "--quiet"]) == 0
    assert (
        json.loads(_inspected(folder / "soup.safetensors", capsys))["record"]["notation"]
        == "mean([ft0, ft1])"
    )
    named = [f"{path.stem}={path}" for path in pair]
    assert main(["merge", "fisher([ft0, ft1])", *named, "-o", str(folder / "f.safetensors")]) == 0
    assert main(["statistics", *files, "--method", "fisher", "--data", DATA]) == 1
    assert "exists" in capsys.readouterr().err


def _inspected(path: Path, capsys: Any) -> str:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    return str(capsys.readouterr().out)


def test_regmean_plus_merges_one_block_behind_the_other(pair: list[Path]) -> None:
    """Written out for the image tower: the second block's inputs are what the merged first one gives."""
    files = cm.statistics_together(pair, [DATA, "digits#train[:9]@invert"], batch_size=4)
    assert [file.name for file in files] == ["ft0.regmean_plus.safetensors", "ft1.regmean_plus.safetensors"]
    merged = cm.regmean_plus(pair)
    got = merged.state_dict()
    assert merged.model == cm.load(pair[0]).model
    mean = cm.mean([cm.load(path) for path in pair]).state_dict()
    nets = [model_and_images(path)[0] for path in pair]
    spec = cm.resolve_model(None, cm.load(pair[0]))
    moments = mean_and_std(spec.preprocess, "cpu")
    xs = []
    for data in (DATA, "digits#train[:9]@invert"):
        images = torch.from_numpy(pixels(cm.open_split(data), spec.preprocess)).float() / 255
        net: Any = cm.build_model(spec)
        net.load_state_dict(mean)
        x = net.visual.conv1((images - moments[0]) / moments[1]).flatten(2).transpose(1, 2)
        x = torch.cat([net.visual.class_embedding.expand(len(x), 1, -1), x], 1)
        xs.append(net.visual.ln_pre(x + net.visual.positional_embedding).detach())
    out: Any = cm.build_model(spec)
    out.load_state_dict(got)
    for i in range(2):
        name = f"visual.transformer.resblocks.{i}.attn.in_proj_weight"
        grams, layers = [], []
        for net, x in zip(nets, xs, strict=True):
            rows = net.visual.transformer.resblocks[i].ln_1(x).detach().flatten(0, 1).double().numpy()
            square = rows.T @ rows
            grams.append(0.95 * square + 0.05 * np.diag(np.diag(square)))
            layers.append(net.state_dict()[name].double().numpy())
        expected = sum(w @ g for w, g in zip(layers, grams, strict=True)) @ np.linalg.inv(sum(grams))
        assert got[name].numpy() == pytest.approx(expected, abs=2e-5)
        xs = [out.visual.transformer.resblocks[i](x).detach() for x in xs]
    assert torch.equal(got["visual.conv1.weight"], mean["visual.conv1.weight"])
    for name in ("transformer.resblocks.0.mlp.c_proj.weight", "visual.proj"):
        assert not torch.allclose(got[name], mean[name], rtol=0, atol=1e-6)
    cm.statistics_together([pair[0], pair[0]], [DATA, DATA], force=True)
    alone = cm.regmean_plus([pair[0], pair[0]]).state_dict()
    for name, tensor in cm.load(pair[0]).state_dict().items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-5, atol=1e-6)


def test_regmean_plus_is_a_command_that_verify_computes_again(pair: list[Path], capsys: Any) -> None:
    out = pair[0].with_name("merged.safetensors")
    take = ["statistics", "--method", "regmean_plus", "--data", DATA, "--images", "5", *map(str, pair)]
    merge = ["merge", "regmean_plus([a, b])", f"a={pair[0]}", f"b={pair[1]}", "-o", str(out)]
    assert main(merge) == 1
    assert "clipmerge statistics --method regmean_plus CKPT... --data DATA" in capsys.readouterr().err
    assert main(take) == 0
    assert main(merge) == 0
    assert main(["verify", str(out)]) == 0
    turned = cm.regmean_plus(pair[::-1]).save(pair[0].with_name("turned.safetensors"))
    assert all(torch.equal(tensor, read(turned)[name]) for name, tensor in read(out).items())
    assert main(take) == 1  # they are there
    for wrong in (["--method", "regmean", "--off-diagonal", "0.5"], ["--method", "other"]):
        assert main(["statistics", str(pair[0]), "--data", DATA, *wrong]) == 2


def test_statistics_that_were_taken_together_stay_together(
    pair: list[Path], tiny_checkpoints: Any, tiny_spec: Any
) -> None:
    a, b, c = (*pair, pair[0].with_name("ft2.safetensors"))
    cm.load(tiny_checkpoints["ft2"]).save(c, metadata={"model": tiny_spec.to_metadata()})
    cm.statistics_together([a, b], [DATA, DATA], images=5, off_diagonal=0.5)
    assert cm.regmean_plus([a, b], off_diagonal=0.5).state_dict()
    with pytest.raises(RecipeError, match=r"were taken for off_diagonal=0\.5, not 0\.95") as refusal:
        cm.regmean_plus([a, b]).state_dict()
    assert refusal.value.hint == "merge with off_diagonal=0.5, or take them again with --off-diagonal"
    with pytest.raises(RecipeError, match="were taken together with other checkpoints"):
        cm.regmean_plus([a]).state_dict()
    files = [path.with_name(f"{path.stem}.regmean_plus.safetensors") for path in (a, b)]
    shutil.copy(files[0], kept := a.with_name("before.safetensors"))
    cm.statistics_together([a, b], [DATA, DATA], images=4, off_diagonal=0.5, force=True)
    with pytest.raises(RecipeError, match="were not taken together"):
        cm.regmean_plus([a, b], statistics=[kept, files[1]], off_diagonal=0.5).state_dict()
    cm.statistics_together([b, c], [DATA, DATA], images=5, force=True)
    with pytest.raises(RecipeError, match="were not taken together"):
        cm.regmean_plus([a, b]).state_dict()


def test_a_leaderboard_runs_regmean_plus_in_its_own_company_alone(pair: list[Path]) -> None:
    from clipmerge.search.leaderboard import methods_with_statistics

    cm.statistics_together(pair, [DATA, DATA], images=4)
    cm.statistics(pair[0], DATA, method="regmean", images=4)
    both = [cm.load(path) for path in pair]
    assert methods_with_statistics(both) == ("regmean_plus",)
    assert methods_with_statistics(both[:1]) == ("regmean",)
    assert methods_with_statistics([both[0], both[1] - both[0]]) == ()
