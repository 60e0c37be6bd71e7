"""Model soups (arXiv 2203.05482): a random search over hyperparameters, then averages of what it left."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from study import Study, claim, claims_table, column, interval, weights

import clipmerge as cm

ROLES = {
    "zero-shot": "base",
    "best single model": "best",
    "uniform soup": "uniform",
    "greedy soup": "greedy",
    "greedy ensemble": "ensemble",
}
"""Model → its role in a comparison's figure."""

KINDS = {"uniform": [], "greedy": ["--greedy"], "learned": ["--learned"]}
Scores = dict[str, float]


def run(study: Study) -> None:
    """Make a pool for each seed, choose soups on held-out images, report on test images and their shifts."""
    setting = study.setting["soups"]
    task, shifts = setting["task"], [f"{setting['task']}@{shift}" for shift in setting["shifts"]]
    space = study.folder / "soups-space.toml"
    space.write_text(_space(setting["space"], setting["fixed"]), encoding="utf-8")
    val = ["--val", study.source(task, "val", 0), "--templates", study.template(task)]
    search = [
        "sweep",
        "--base",
        study.base,
        "--train",
        study.source(task, "train", 0),
        *val,
        "--space",
        space.name,
        "--trials",
        setting["trials"],
    ]
    study.run((f"soups/{s}/search", [*search, "--seed", s, "-o", f"weights/soups/{s}"]) for s in study.seeds)
    pools = {s: _pool(study.folder, s) for s in study.seeds}
    rows: dict[str, list[Scores]] = {}
    chosen: list[dict[str, Any]] = []
    jobs = [
        (
            f"soups/{s}/{kind}",
            ["soup", *pools[s], *options, *(val if options else []), "-o", weights(f"soups/{s}-{kind}")],
        )
        for s in study.seeds
        for kind, options in KINDS.items()
    ]
    jobs += [(f"soups/{s}/ensemble", ["soup", *pools[s], "--ensemble", *val]) for s in study.seeds]
    study.run(jobs)
    test = [
        word for name in (task, *shifts) for word in study.images("--data", name, "test", setting["test"])
    ]
    for s in study.seeds:
        held_out = study.scores(f"soups/{s}/held-out", pools[s], study.images("--data", task, "val", 0))
        files = {kind: weights(f"soups/{s}-{kind}") for kind in KINDS}
        scores = study.scores(f"soups/{s}/test", [study.base, *pools[s], *files.values()], test)
        best = max(pools[s], key=lambda file: held_out[file][task])
        members = json.loads((study.folder / f"results/soups/{s}/ensemble.json").read_text(encoding="utf-8"))
        table = {"zero-shot": scores[study.base], "best single model": scores[best]}
        table |= {f"{kind} soup": scores[file] for kind, file in files.items()}
        table["greedy ensemble"] = _ensemble(study, s, _files(members, pools[s]), [task, *shifts])
        pool = [_summary(scores[file]) for file in pools[s]]
        rows.setdefault("mean of the finetunings", []).append({k: mean(p[k] for p in pool) for k in pool[0]})
        for name, row in table.items():
            rows.setdefault(name, []).append(_summary(row))
        chosen.append(
            {
                "pool": pool,
                **{k: _summary(v) for k, v in table.items()},
            }
        )
    _chapter(study, task, rows, chosen)
    cm.plot(_figure(task, chosen), study.folder / "soups.png")


def _space(space: dict[str, dict[str, Any]], fixed: dict[str, Any]) -> str:
    """Return a search space as the TOML file that `clipmerge sweep --space` reads."""
    tables = {**space, "fixed": fixed}
    lines = (
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items())
        for name, rows in tables.items()
    )
    return "\n".join(lines)


def _pool(folder: Path, seed: int) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in (folder / f"weights/soups/{seed}").glob("trial-*.safetensors")
    )


def _files(result: dict[str, Any], pool: Sequence[str]) -> list[str]:
    """Return the files of a result's ingredients, which it names by their stems."""
    stems = {Path(file).stem: file for file in pool}
    return [stems[name] for name in result["ingredients"]]


def _ensemble(study: Study, seed: int, members: Sequence[str], names: Sequence[str]) -> Scores:
    """Return what the mean of the members' logits scores on test images: a command can only choose them."""
    store = study.folder / f"results/soups/{seed}/ensemble-test.json"
    sources = {name: study.source(name, "test", study.setting["soups"]["test"]) for name in names}
    asked = {"members": list(members), "images": sources}
    known = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    if {key: known.get(key) for key in asked} != asked:
        splits = {
            column(name): cm.open_split(source, templates=[study.template(name)])
            for name, source in sources.items()
        }
        evaluator = cm.Evaluator(splits)
        models = [cm.load(study.folder / file) for file in members]
        scores = {}
        for name in splits:
            total = sum(np.asarray(evaluator.logits(model, name), dtype=np.float64) for model in models)
            scores[name] = float(100 * np.mean(np.argmax(total, axis=1) == evaluator.labels(name)))
        known = {**asked, "scores": scores}
        store.write_text(json.dumps(known), encoding="utf-8")
    return dict(known["scores"])


def _summary(row: Scores) -> Scores:
    """Return accuracy in distribution (the first of the images) and the mean of the shifts."""
    first, *others = row.values()
    return {"id": first, "shifts": mean(others)}


def _figure(task: str, chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `clipmerge.plot` draws: every model of every seed by its two scores."""
    rows = []
    for one in chosen:
        found = [("ingredient", point) for point in one["pool"]]
        found += [(role, one[name]) for name, role in ROLES.items()]
        rows += [
            {"role": role, "scores": {axis: value / 100 for axis, value in point.items()}}
            for role, point in found
        ]
    labels = {"id": task, "shifts": "mean of the shifts"}
    return {"kind": "comparison", "x": "id", "y": "shifts", "labels": labels, "rows": rows}


def _chapter(study: Study, task: str, rows: dict[str, list[Scores]], chosen: list[dict[str, Any]]) -> None:
    shown = {
        name: {key: [row[key] for row in found] for key in ("id", "shifts")} for name, found in rows.items()
    }
    best, greedy, uniform = (shown[name] for name in ("best single model", "greedy soup", "uniform soup"))
    files = {f"{kind} soup": {s: weights(f"soups/{s}-{kind}") for s in study.seeds} for kind in KINDS}
    average = shown["mean of the finetunings"]
    claims = [
        claim(
            "(added later) the uniform soup beats its average ingredient, in distribution",
            uniform["id"],
            average["id"],
        ),
        claim("… and under shift", uniform["shifts"], average["shifts"]),
        claim("the greedy soup beats the best single model, in distribution", greedy["id"], best["id"]),
        claim("… and under shift", greedy["shifts"], best["shifts"]),
        claim("the uniform soup beats the best single model under shift", uniform["shifts"], best["shifts"]),
        claim(
            "the greedy soup is at least as good as the uniform one, in distribution",
            greedy["id"],
            uniform["id"],
        ),
        claim(
            "the learned soup beats the greedy one, in distribution",
            shown["learned soup"]["id"],
            greedy["id"],
        ),
        claim(
            "the ensemble beats the greedy soup, in distribution",
            shown["greedy ensemble"]["id"],
            greedy["id"],
        ),
        claim(
            "… but not under shift: there the soup is ahead",
            greedy["shifts"],
            shown["greedy ensemble"]["shifts"],
        ),
    ]
    first = chosen[0]
    series = [
        {
            "label": "a finetuning",
            "points": [[p["id"], p["shifts"], f"trial {i}"] for i, p in enumerate(first["pool"])],
        }
    ]
    series += [
        {"label": name, "points": [[first[name]["id"], first[name]["shifts"], name]]}
        for name in rows
        if name in first
    ]
    setting = study.setting["soups"]
    study.write_chapter(
        1,
        "soups",
        title="Soups",
        text=[
            f"{setting['trials']} finetunings of {task} for each seed, drawn from a random search like "
            "the paper's (learning rate, weight decay, length, label smoothing, mixup, augmentation). "
            "Which models go into a soup was chosen on held-out images; everything below is on test "
            f"images, and on {len(setting['shifts'])} changes of them ({', '.join(setting['shifts'])}), "
            "which nothing was chosen on.",
        ],
        tables=[
            {
                "caption": "Accuracy on test images, %",
                "columns": ["model", "in distribution", "mean of the shifts"],
                "rows": [
                    study.row([n, interval(v["id"]), interval(v["shifts"])], files.get(n, {}))
                    for n, v in shown.items()
                ],
                "note": f"n = {setting['test']} test images a column, seeds {study.seeds}; the ensemble runs "
                "all of its members for every image.",
            },
            claims_table(claims, study.seeds),
        ],
        charts=[
            {
                "caption": f"One seed's pool ({study.seeds[0]}): a model of each finetuning, and what was "
                "made of them",
                "x": f"{task}, test accuracy in %",
                "y": "mean of the shifts in %",
                "kind": "points",
                "series": series,
            }
        ],
        settings={"task": task, "finetunings": setting["trials"]},
    )
