"""What all commands that score share: prompts and heads per data set, encoders of papers, names, the summary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipmerge as cm
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.model import build_model, get_tokenizer
from clipmerge.weights.labels import names_of
from clipmerge_cli.app import main

VAL = "digits#val"


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoints: Any, tiny_model_file: Path, monkeypatch: Any) -> Path:
    """`base.pt` is whole; `zs.pt`, `a.pt` and `b.pt` are encoders as task_vectors and patching save them."""
    monkeypatch.chdir(tmp_path)
    for name, source in {"zs": "base", "a": "ft0", "b": "ft1"}.items():
        tensors = load_file(tiny_checkpoints[source])
        whole = tensors if source == "base" else {**load_file(tiny_checkpoints["base"]), **_image(tensors)}
        save_file(whole, f"whole_{name}.safetensors")
        encoder = {f"model.{n}": t for n, t in whole.items() if not n.startswith("transformer.")}
        torch.save(encoder, f"{name}.pt")
    torch.save(load_file("whole_zs.safetensors"), "base.pt")
    return tmp_path


def _image(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}


def run(capsys: Any, *words: str, code: int = 0) -> tuple[str, str]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == code, captured.err
    return captured.out, captured.err


@pytest.fixture
def options(tiny_model_file: Path) -> list[str]:
    return ["--model", str(tiny_model_file), "--limit", "40", "--json"]


def test_an_encoder_is_scored_with_a_text_tower_beside_it(folder, options, capsys):
    data = ["--data", VAL, *options]
    whole = json.loads(run(capsys, "evaluate", "whole_a.safetensors", "whole_b.safetensors", *data)[0])
    for option in ("--base", "--text-tower"):
        encoders = json.loads(run(capsys, "evaluate", "a.pt", "b.pt", option, "base.pt", *data)[0])
        assert [row["scores"] for row in encoders["checkpoints"]] == [
            row["scores"] for row in whole["checkpoints"]
        ]
    _, err = run(capsys, "evaluate", "a.pt", *data, code=1)
    assert "error: a has no text tower, which digits#val is scored by" in err
    assert "--text-tower CKPT" in err
    assert "--head digits#val=FILE" in err


def test_searches_over_the_papers_encoders_choose_as_over_whole_models(folder, options, capsys):
    val = ["--val", f"one={VAL}", "--val", f"two={VAL}@invert", "--scale", "auto", "--scales", "0,0.5,1"]
    patch = ["--patch", f"{VAL}@invert", "--supported", VAL, "--alphas", "0,0.5,1"]
    soup = ["--greedy", "--val", VAL]

    def history(*words: str) -> Any:
        document = json.loads(run(capsys, *words, *options, "--fresh")[0])
        points = document["history"] if "history" in document else document["steps"][0]["history"]
        return [point.get("scores") or point["value"] for point in points]

    def whole(*names: str) -> list[str]:
        return [f"whole_{name}.safetensors" for name in names]

    expected = history("add", *whole("zs", "a", "b"), *val)
    assert history("add", "base.pt", "a.pt", "b.pt", *val) == expected
    assert history("add", "zs.pt", "a.pt", "b.pt", "--text-tower", "base.pt", *val) == expected
    assert history("patch", "base.pt", "a.pt", *patch) == history("patch", *whole("zs", "a"), *patch)
    expected = history("soup", *whole("a", "b"), *soup)
    assert (
        history("soup", "a.pt", "b.pt", "--text-tower", "base.pt", *soup, "-o", "s.safetensors") == expected
    )
    assert not any(name.startswith("transformer.") for name in load_file("s.safetensors"))
    assert history("soup", "a.pt", "b.pt", "--base", "base.pt", *soup, "-o", "t.safetensors") == expected
    assert load_file("t.safetensors").keys() == load_file("whole_a.safetensors").keys()
    base = cm.load("base.pt")
    assert names_of([cm.load(name).completed_from(base) for name in ("a.pt", "b.pt")]) == ["a", "b"]
    assert history("soup", *whole("a", "b"), "--learned", "--val", VAL, "--epochs", "1") == []


def test_a_head_from_a_file_takes_the_place_of_prompts(folder, options, tiny_spec, capsys):
    """The papers' heads: logit scale times unit prompt features, saved by themselves."""
    model = build_model(tiny_spec)
    model.load_state_dict(load_file("whole_zs.safetensors"))
    split = cm.open_split(VAL, limit=40)
    from clipmerge.evaluate.heads import zero_shot_head

    head = zero_shot_head(model, get_tokenizer(tiny_spec), split.classes, ["a photo of {}"])
    weight = model.logit_scale.exp().detach() * head  # type: ignore[operator,union-attr]
    torch.save({"weight": weight, "bias": torch.zeros(10)}, "head_one.pt")
    torch.save({"weight": weight.flip(0)}, "head_two.pt")
    data = ["--data", f"one={VAL}", "--data", f"two={VAL}", *options]
    prompted = json.loads(
        run(capsys, "evaluate", "whole_a.safetensors", *data, "--templates", "a photo of {}")[0]
    )
    heads = ["--head", "one=head_one.pt", "--head", "two=head_two.pt"]
    document = json.loads(run(capsys, "evaluate", "a.pt", *data, *heads)[0])
    (row,) = document["checkpoints"]
    assert row["prompts"]["one"] == {"head": "file"}
    metrics = row["scores"]["one"]["metrics"]
    assert metrics == pytest.approx(prompted["checkpoints"][0]["scores"]["one"]["metrics"], abs=1e-6)
    logits = Evaluator(split, tiny_spec, heads={"val": "head_two.pt"}).logits("a.pt")
    assert torch.allclose(
        logits, Evaluator(split, tiny_spec, heads={"val": "head_one.pt"}).logits("a.pt").flip(1), atol=1e-4
    )
    add = ["add", "zs.pt", "a.pt", "--scale", "auto", "--scales", "0,1", "--val", f"one={VAL}"]
    added = json.loads(run(capsys, *add, "--head", "one=head_one.pt", *options)[0])
    assert added["history"][1]["scores"]["one"]["correct"] == row["scores"]["one"]["correct"]
    torch.save({"weight": weight[:9]}, "nine.pt")
    _, err = run(capsys, "evaluate", "a.pt", "--data", VAL, "--head", "nine.pt", *options, code=1)
    assert "the head has 9 classes, digits#val has 10" in err
    _, err = run(capsys, "evaluate", "a.pt", "--data", VAL, "--head", "b.pt", *options, code=1)
    assert "b.pt has no classification head" in err


def test_prompts_and_class_names_per_data_set(folder, options, tiny_spec, capsys):
    Path("names.txt").write_text("\n".join(["zero", "one", "two", "three", "four", *"56789"]))
    data = ["--data", f"a={VAL}", "--data", f"b={VAL}", "--data", f"c={VAL}"]
    given = ["--templates", "a=the {}", "--templates", "simple", "--classnames", "b=names.txt"]
    (row,) = json.loads(run(capsys, "evaluate", "base.pt", *data, *given, *options)[0])["checkpoints"]

    def expected(templates: str, names: str | None = None) -> Any:
        split = cm.open_split(VAL, limit=40, classnames=names, templates=templates)
        return Evaluator(split, tiny_spec).score("base.pt").metrics

    assert row["scores"]["a"]["metrics"] == expected("the {}")
    assert row["scores"]["b"]["metrics"] == expected("simple", "names.txt")
    assert row["scores"]["c"]["metrics"] == expected("simple")
    assert row["prompts"]["a"] == {
        "head": "zero-shot", "templates": ["the {}"], "templates_from": "given", "classes_from": "the data's",
    }  # fmt: skip
    assert row["prompts"]["b"]["classes_from"] == "given"
    for wrong, says in (
        (["--templates", "aa=simple"], "no images are called 'aa': did you mean a?"),
        (["--templates", "a=simple", "--templates", "a=openai"], "'a' is given twice"),
        (["--templates", "simple", "--templates", "openai"], "the value for all images is given twice"),
    ):
        assert says in " ".join(run(capsys, "evaluate", "base.pt", *data, *wrong, code=2)[1].split())


def test_prompts_are_in_the_summary_in_json_and_in_the_record(folder, options, capsys):
    base, model = "whole_zs.safetensors", options[:2]
    for name in ("x", "y"):
        few = ["--limit", "64", "--steps", "1", "--batch-size", "32", "-o", f"{name}.safetensors"]
        prompts = ["--templates", f"{name} marks {{}}"]
        run(capsys, "finetune", "--base", base, "--train", "digits", *model, *few, *prompts)
    _, err = run(capsys, "evaluate", "x.safetensors", "y.safetensors", base, "--data", VAL, *options[:4])
    assert "360" not in err
    assert "40 images of digits#val, 10 classes" in err
    assert "x: tiny (given); prompts 'x marks {}' (recorded)" in err
    assert "y: tiny (given); prompts 'y marks {}' (recorded)" in err
    assert "whole_zs: tiny (given); prompts 'a photo of the number: \"{}\".' (the data's)" in err
    _, err = run(capsys, "evaluate", "x.safetensors", "--data", "digits", "--limit", "20")
    summary = "scoring on cpu, fp32: tiny (recorded in x); prompts 'x marks {}' (recorded); "
    assert summary + "20 images of digits, #test, 10 classes" in err
    search = ["soup", "x.safetensors", "y.safetensors", "--greedy", "--val", VAL, "--limit", "20", "--json"]
    _, err = run(capsys, *search, code=1)
    assert "the checkpoints record different prompts for val: 'x marks {}' and 'y marks {}' among them" in err
    chosen = json.loads(run(capsys, *search, "--templates", "z {}", "-o", "z.safetensors")[0])
    assert chosen["prompts"]["val"]["templates"] == ["z {}"]
    record = cm.load("z.safetensors").record
    assert record["selection"]["prompts"]["val"]["templates"] == ["z {}"]
    assert [entry["templates"] for entry in record["prompts"]] == [["z {}"]]
    # what was written is scored as it was chosen
    scored = json.loads(run(capsys, "evaluate", "z.safetensors", "--data", *search[5:])[0])
    (row,) = scored["checkpoints"]
    assert row["prompts"][VAL]["templates"] == ["z {}"]
    assert row["scores"][VAL]["correct"] == chosen["score"]["correct"]


def test_names_are_those_on_disk_with_as_much_of_the_path_as_tells_them_apart(
    folder, tiny_checkpoints, options, capsys
):
    places = ["run 1/model-best.safetensors", "run 2/model-best.safetensors", "my-soup (1).safetensors"]
    for place in places:
        Path(place).parent.mkdir(exist_ok=True)
        save_file(load_file(tiny_checkpoints["ft0"]), place)
    names = ["run 1/model-best", "run 2/model-best", "my-soup (1)"]
    out, _ = run(capsys, "evaluate", *places, "--data", VAL, *options[:4])
    assert [
        line.strip().startswith(name) for line, name in zip(out.splitlines()[3:6], names, strict=True)
    ] == [True] * 3
    greedy = json.loads(run(capsys, "soup", *places, "--greedy", "--val", VAL, *options)[0])
    assert greedy["candidates"] == names
    assert sorted(greedy["ingredients"]) == sorted(names)
    learned = json.loads(
        run(capsys, "soup", *places, "--learned", "--epochs", "1", "--val", VAL, *options)[0]
    )
    assert list(learned["coefficients"]) == names
    opened = [cm.load(place) for place in places]  # each called "model_best" in notation
    scores = cm.score(opened, cm.open_split(VAL, limit=40), model=options[1])
    assert list(scores) == names
    both = [cm.load(place) for place in ("a.pt", "whole_a.safetensors", "a.pt")]
    assert names_of([*both, cm.mean(both[:2])])[:3] == ["a", "whole_a", "a (2)"]
    save_file(load_file(tiny_checkpoints["ft0"]), "a.safetensors")
    assert names_of([cm.load("a.pt"), cm.load("a.safetensors")]) == ["a.pt", "a.safetensors"]


def test_evaluate_is_a_leaderboard(folder, options, tiny_spec, capsys, tmp_path):
    import csv

    Path("ckpts.txt").write_text("# mine\nwhole_zs.safetensors\n\nwhole_a.safetensors\n")
    Path("data.txt").write_text(f"up={VAL}\ndown={VAL}@rotate:30\n")
    words = ["evaluate", "@ckpts.txt", "--data", "@data.txt", *options, "--journal", "scores.jsonl"]
    document = json.loads(run(capsys, *words, "-o", "t.csv")[0])
    rows = document["checkpoints"]
    assert [row["name"] for row in rows] == ["whole_zs", "whole_a"]
    for row in rows:
        for metric in ("top1", "ece"):
            values = [score["metrics"][metric] for score in row["scores"].values()]
            assert row["mean"][metric] == pytest.approx(sum(values) / 2)
    with Path("t.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    # the columns of CLIP_benchmark's benchmark.csv, but for the one that only multi-label data have
    assert list(table[0])[:10] == [
        "acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@5", "text_retrieval_recall@5",
        "dataset", "model", "pretrained", "task", "model_fullname",
    ]  # fmt: skip
    assert [(r["pretrained"], r["dataset"]) for r in table] == [
        (path, name) for path in ("whole_zs.safetensors", "whole_a.safetensors") for name in ("up", "down")
    ]
    assert {(r["model"], r["task"], r["n"]) for r in table} == {("tiny", "zeroshot_classification", "40")}
    scored = [s for row in rows for s in row["scores"].values()]
    assert [float(r["acc1"]) for r in table] == [s["metrics"]["top1"] for s in scored]
    assert [float(r["mean_per_class_recall"]) for r in table] == [
        s["metrics"]["mean_per_class"] for s in scored
    ]
    # only what is new is scored again
    Path("data.txt").write_text(f"up={VAL}\ndown={VAL}@rotate:30\ninverted={VAL}@invert\n")
    text = [word for word in words if word != "--json"]
    out, err = run(capsys, *text, "--skip-existing", "-o", "t.md")
    assert "4 of 6 scores were remembered" in err
    assert "wrote t.md" in err
    lines = Path("t.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "checkpoint",
        "up",
        "down",
        "inverted",
        "mean",
    ]
    best = [float(line.strip("| ").split("|")[-1]) for line in lines[2:]]
    assert best == sorted(best, reverse=True)
    shown = [line.split() for line in out.split("best mean first")[1].splitlines()[4:6]]
    assert [row[0] for row in shown] == [line.split()[1] for line in lines[2:]]
    again = json.loads(run(capsys, *words, "--skip-existing", "-o", "t.json")[0])
    assert json.loads(Path("t.json").read_text()) == {k: v for k, v in again.items() if k != "output"}
    assert again["checkpoints"][1]["scores"]["up"] == rows[1]["scores"]["up"]
    _, err = run(capsys, *words, "-o", "t.csv", code=1)
    assert "t.csv already exists" in err
    _, err = run(capsys, *words, "-o", "t.xlsx", code=1)
    assert "use a name in .csv, .md or .json" in err
    _, err = run(capsys, "evaluate", "@none.txt", "--data", VAL, code=2)
    assert "the list none.txt cannot be read: No such file" in " ".join(err.split())
