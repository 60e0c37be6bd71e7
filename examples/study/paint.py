"""PAINT (arXiv 2208.05592): learn three tasks and keep four, in each of the paper's ways."""

from statistics import mean
from typing import Any

from arithmetic import finetune_tasks, tuned
from study import Study, claim, claims_table, interval, weights

WAYS = ("joint", "sequential", "parallel")


def run(study: Study) -> None:
    """Patch each task alone, then all of them jointly, one after the other, and in parallel."""
    new = study.setting["paint"]["patching"]
    finetune_tasks(study, new)
    options = study.setting["tasks"]["options"]
    union = [word for task in new for word in study.images("--train", task, "train", 0)] + [
        "--shares",
        "equal",
    ]
    joint = {**options, "steps": options["steps"] * len(new)}
    study.run(study.finetuned(f"paint/union-{seed}", union, joint, seed=seed) for seed in study.seeds)
    jobs = [
        _patch(study, f"paint/{task}-{seed}", study.base, [tuned(task, seed)], [task])
        for seed in study.seeds
        for task in new
    ]
    for seed in study.seeds:
        jobs.append(_patch(study, f"paint/joint-{seed}", study.base, [f"paint/union-{seed}"], new, "joint"))
        jobs.append(
            _patch(
                study,
                f"paint/parallel-{seed}",
                study.base,
                [tuned(task, seed) for task in new],
                new,
                "parallel",
            )
        )
    study.run(jobs)
    # The paper's sequential way: the next task is finetuned from the model that was patched with those before it.
    patched = {seed: f"paint/{new[0]}-{seed}" for seed in study.seeds}
    for turn, task in enumerate(new[1:], start=2):
        images = study.images("--train", task, "train", 0)
        study.run(
            study.finetuned(
                f"paint/then-{task}-{seed}", images, {**options, "base": weights(patched[seed])}, seed=seed
            )
            for seed in study.seeds
        )
        steps = {s: f"paint/{'sequential' if turn == len(new) else f'after-{task}'}-{s}" for s in study.seeds}
        study.run(
            _patch(study, steps[s], weights(patched[s]), [f"paint/then-{task}-{s}"], new[:turn], "joint")
            for s in study.seeds
        )
        patched = steps
    _chapter(study, {seed: _scores(study, seed) for seed in study.seeds})


def _patch(
    study: Study, name: str, base: str, models: list[str], new: list[str], mode: str = ""
) -> tuple[str, list[Any]]:
    setting = study.setting["paint"]
    images = [word for task in new for word in study.images("--patch", task, "val")]
    images += [word for task in setting["supported"] for word in study.images("--supported", task, "val")]
    how = ["--mode", mode] if mode else []
    how += ["--budget", setting["budget"]] if mode == "parallel" else ["--alphas", setting["alphas"]]
    return name, [
        "patch",
        base,
        *map(weights, models),
        *how,
        *images,
        "-o",
        weights(name),
    ]


def _scores(study: Study, seed: int) -> dict[str, dict[str, float]]:
    """Return model → test images → accuracy, for one seed."""
    new, old = study.setting["paint"]["patching"], study.setting["paint"]["supported"]
    names = {"zero-shot": study.base}
    names |= {f"finetuned on {task}": weights(tuned(task, seed)) for task in new}
    names |= {f"patched with {task}": weights(f"paint/{task}-{seed}") for task in new}
    names |= {"finetuned on all three": weights(f"paint/union-{seed}")}
    names |= {way: weights(f"paint/{way}-{seed}") for way in WAYS}
    data = [word for task in (*new, *old) for word in study.images("--data", task, "test")]
    found = study.scores(f"paint/test-{seed}", list(names.values()), data)
    return {name: found[file] for name, file in names.items()}


def _chapter(study: Study, scores: dict[int, dict[str, dict[str, float]]]) -> None:
    new, old = study.setting["paint"]["patching"], study.setting["paint"]["supported"]

    def side(model: str, tasks: list[str]) -> list[float]:
        return [mean(scores[seed][model][task] for task in tasks) for seed in study.seeds]

    models = list(next(iter(scores.values())))
    rows = []
    for model in models:
        word = model.removeprefix("patched with ")
        files = (
            {seed: weights(f"paint/{word}-{seed}") for seed in study.seeds} if word in (*WAYS, *new) else {}
        )
        cells = [model, *(interval(side(model, [task])) for task in new)]
        rows.append(study.row([*cells, interval(side(model, new)), interval(side(model, old))], files))
    claims = []
    for task in new:
        patched = f"patched with {task}"
        claims.append(claim(f"patching {task} learns it", side(patched, [task]), side("zero-shot", [task])))
        kept = [value + 1 for value in side(patched, old)]
        claims.append(
            claim(
                "… and costs the supported tasks less than a point (left: patched + 1)",
                kept,
                side("zero-shot", old),
            )
        )
        claims.append(
            claim("… less than finetuning does", side(patched, old), side(f"finetuned on {task}", old))
        )
    both = [*new, *old]
    claims.append(
        claim(
            "joint is at least as good as sequential, over all tasks",
            side("joint", both),
            side("sequential", both),
        )
    )
    claims.append(
        claim("sequential is at least as good as parallel", side("sequential", both), side("parallel", both))
    )
    study.write_chapter(
        5,
        "paint",
        title="Patching",
        text=[
            f"Three tasks to learn ({', '.join(new)}) and four to keep ({', '.join(old)}). α is the best "
            "mean of both groups' held-out accuracy. Jointly: one finetuning on all three; one after the "
            "other: each finetuned from the model patched before; in parallel: three finetunings of the "
            "base, all coefficients searched together.",
        ],
        tables=[
            {
                "caption": "Accuracy on test images, %",
                "columns": ["model", *new, "patching tasks", "supported tasks"],
                "rows": rows,
                "note": f"n = {study.setting['images']['test']} test images a task, seeds {study.seeds}.",
            },
            claims_table(claims, study.seeds),
        ],
        charts=[
            {
                "caption": "What was learned against what was kept (mean over seeds)",
                "x": "mean of the supported tasks, %",
                "y": "mean of the patching tasks, %",
                "kind": "points",
                "series": [
                    {"label": m, "points": [[mean(side(m, old)), mean(side(m, new)), m]]} for m in models
                ],
            }
        ],
        settings={"finetuning": str(study.setting["tasks"]["options"])},
    )
