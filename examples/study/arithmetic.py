"""Task arithmetic (arXiv 2212.04089): pairs and all tasks added, each task forgotten, and one analogy."""

from itertools import combinations
from statistics import mean
from typing import Any

from study import Study, claim, claims_table, column, interval, weights


def tuned(task: str, seed: int) -> str:
    """Return the name of a task's finetuning, which other chapters use too."""
    return f"tasks/{column(task)}-{seed}"


def finetune_tasks(study: Study, tasks: list[str]) -> None:
    """Finetune the base on each task and seed, the image tower alone, under the zero-shot head."""
    study.run(
        study.finetuned(
            tuned(task, seed),
            study.images("--train", task, "train", 0),
            study.setting["tasks"]["options"],
            seed=seed,
        )
        for seed in study.seeds
        for task in tasks
    )


def run(study: Study) -> None:
    """Add, negate, and draw the analogy; scales are chosen on held-out images."""
    setting, tasks = study.setting["arithmetic"], study.setting["tasks"]["names"]
    letters = setting["analogy"]
    finetune_tasks(study, [*tasks, *(task for task in letters.values() if task not in tasks)])
    sums = [*combinations(tasks, 2), tuple(tasks)]
    jobs = []
    for seed in study.seeds:
        for members in sums:
            images = [word for task in members for word in study.images("--val", task, "val")]
            files = [weights(tuned(task, seed)) for task in members]
            name = _sum(members, seed)
            search = ["--scale", "auto", "--scales", setting["scales"]]
            jobs.append((name, ["add", study.base, *files, *search, *images, "-o", weights(name)]))
    study.run(jobs)
    pairs, everything = _additions(study, sums)
    forgotten = _negations(study)
    _chapter(study, pairs, everything, forgotten, _analogy(study))


def _sum(members: tuple[str, ...], seed: int) -> str:
    return f"arithmetic/{'all' if len(members) > 2 else '-'.join(members)}-{seed}"


def _additions(
    study: Study, sums: list[tuple[str, ...]]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return what pairs and all tasks reach on test images: means over tasks, absolute and normalised, "
    "by seed."""
    tasks = study.setting["tasks"]["names"]
    data = [word for task in tasks for word in study.images("--data", task, "test")]
    pairs: dict[str, list[Any]] = {
        "sum": [],
        "normalised": [],
        "zero-shot": [],
        "zero-shot normalised": [],
        "each": [],
    }
    everything: dict[str, list[Any]] = {
        "sum": [],
        "normalised": [],
        "zero-shot": [],
        "zero-shot normalised": [],
        "finetuned": [],
    }
    for seed in study.seeds:
        files = [
            study.base,
            *(weights(tuned(task, seed)) for task in tasks),
            weights(_sum(tuple(tasks), seed)),
        ]
        scores = study.scores(f"arithmetic/test-{seed}", files, data)
        own = {task: scores[weights(tuned(task, seed))][task] for task in tasks}
        base, whole = scores[study.base], scores[files[-1]]
        zero_shot = mean(base[task] for task in tasks)
        zero_shot_normalised = 100 * mean(base[task] / own[task] for task in tasks)
        everything["sum"].append(mean(whole[task] for task in tasks))
        everything["normalised"].append(100 * mean(whole[task] / own[task] for task in tasks))
        everything["finetuned"].append(mean(own.values()))
        for table in (everything, pairs):  # each task is in as many pairs
            table["zero-shot"].append(zero_shot)
            table["zero-shot normalised"].append(zero_shot_normalised)
        jobs = []
        for members in sums[:-1]:
            images = [word for task in members for word in study.images("--data", task, "test")]
            jobs.append((f"{_sum(members, seed)}-test", ["evaluate", weights(_sum(members, seed)), *images]))
        ratios, values = [], []
        for members, document in zip(sums[:-1], study.run(jobs), strict=True):
            found = {
                task: 100 * score["value"] for task, score in document["checkpoints"][0]["scores"].items()
            }
            values.append(mean(found.values()))
            ratios.append(100 * mean(found[task] / own[task] for task in members))
        pairs["sum"].append(mean(values))
        pairs["normalised"].append(mean(ratios))
        pairs["each"].append(dict(zip([" + ".join(members) for members in sums[:-1]], ratios, strict=True)))
    return pairs, everything


def _negations(study: Study) -> dict[str, list[tuple[float, float, float]]]:
    """Forget each task and return, by task and seed: (target, control) in percent and the scale."""
    tasks, control = study.setting["tasks"]["names"], study.setting["tasks"]["control"]
    jobs = []
    for seed in study.seeds:
        for task in tasks:
            name = f"arithmetic/forget-{task}-{seed}"
            search = ["--scale", "auto", "--scales", study.setting["arithmetic"]["negation_scales"]]
            images = ["--target", study.source(task, "val"), "--templates", f"target={study.template(task)}"]
            images += ["--control", study.source(control, "val")]
            images += ["--templates", f"control={study.template(control)}"]
            jobs.append(
                (
                    name,
                    ["negate", study.base, weights(tuned(task, seed)), *search, *images, "-o", weights(name)],
                )
            )
    scales = [document["coefficients"]["scale"] for document in study.run(jobs)]
    checks = []
    for name, _ in jobs:
        task = name.removeprefix("arithmetic/forget-").rpartition("-")[0]
        images = study.images("--data", task, "test") + study.images("--data", control, "test")
        checks.append((f"{name}-test", ["evaluate", study.base, weights(name), *images]))
    forgotten: dict[str, list[tuple[float, float, float]]] = {"zero-shot": []}
    for (name, _), scale, document in zip(jobs, scales, study.run(checks), strict=True):
        task = name.removeprefix("arithmetic/forget-").rpartition("-")[0]
        base, without = (
            {k: 100 * s["value"] for k, s in row["scores"].items()} for row in document["checkpoints"]
        )
        forgotten["zero-shot"].append((base[task], base[control], 0.0))
        forgotten.setdefault(task, []).append((without[task], without[control], scale))
    return forgotten


def _analogy(study: Study) -> dict[str, list[float]]:
    """Return what A : B = C : D gives on D's test images, where no model saw D's training images, by seed."""
    letters = study.setting["arithmetic"]["analogy"]
    rows: dict[str, list[float]] = {
        "zero-shot": [],
        "finetuned on c": [],
        "analogy": [],
        "finetuned on d": [],
    }
    for seed in study.seeds:
        name = f"arithmetic/analogy-{seed}"
        a, b, c, d = (weights(tuned(letters[letter], seed)) for letter in "abcd")
        search = ["--scale", "auto", "--scales", "0:1:0.1"]
        images = ["--val", study.source(letters["d"], "val"), "--templates", study.template(letters["d"])]
        study.run(
            [
                (
                    name,
                    [
                        "analogy",
                        study.base,
                        "--a",
                        a,
                        "--b",
                        b,
                        "--c",
                        c,
                        *search,
                        *images,
                        "-o",
                        weights(name),
                    ],
                )
            ]
        )
        found = study.scores(
            f"{name}-test", [study.base, c, weights(name), d], study.images("--data", letters["d"], "test")
        )
        for row, scores in zip(rows.values(), found.values(), strict=True):
            row.extend(scores.values())
    return rows


def _chapter(
    study: Study,
    pairs: dict[str, list[Any]],
    everything: dict[str, list[Any]],
    forgotten: dict[str, list[tuple[float, float, float]]],
    analogy: dict[str, list[float]],
) -> None:
    tasks, control = study.setting["tasks"]["names"], study.setting["tasks"]["control"]
    letters = study.setting["arithmetic"]["analogy"]
    added: list[Any] = [
        ["zero-shot", "all", interval(everything["zero-shot"]), interval(everything["zero-shot normalised"])]
    ]
    added += [["a pair added", "its two", interval(pairs["sum"]), interval(pairs["normalised"])]]
    all_of_them = ["all", interval(everything["sum"]), interval(everything["normalised"])]
    files = {seed: weights(_sum(tuple(tasks), seed)) for seed in study.seeds}
    added += [study.row([f"all {len(tasks)} added", *all_of_them], files)]
    added += [["finetuned on each", "its own", interval(everything["finetuned"]), "100.0"]]
    single: list[Any] = []
    for pair in sorted(pairs["each"][0], key=lambda name: -pairs["each"][0][name]):
        files = {seed: weights(_sum(tuple(pair.split(" + ")), seed)) for seed in study.seeds}
        single.append(study.row([pair, interval([seed[pair] for seed in pairs["each"]])], files))
    lost: list[Any] = []
    for task in tasks:
        rows = forgotten[task]
        base = [forgotten["zero-shot"][tasks.index(task) + len(tasks) * i] for i in range(len(study.seeds))]
        columns = [interval([row[0] for row in base]), interval([row[0] for row in rows])]
        columns += [interval([row[1] for row in base]), interval([row[1] for row in rows])]
        files = {seed: weights(f"arithmetic/forget-{task}-{seed}") for seed in study.seeds}
        lost.append(study.row([task, ", ".join(f"{row[2]:g}" for row in rows), *columns], files))
    by_seed = range(len(study.seeds))
    zero_target = [
        mean(forgotten["zero-shot"][i * len(tasks) + t][0] for t in range(len(tasks))) for i in by_seed
    ]
    zero_control = [
        mean(forgotten["zero-shot"][i * len(tasks) + t][1] for t in range(len(tasks))) for i in by_seed
    ]
    target = [mean(forgotten[task][i][0] for task in tasks) for i in by_seed]
    kept = [mean(forgotten[task][i][1] for task in tasks) for i in by_seed]
    claims = [
        claim("a pair added is better at its two tasks than the base", pairs["sum"], pairs["zero-shot"]),
        claim(f"all {len(tasks)} added are better than the base", everything["sum"], everything["zero-shot"]),
        claim(
            "the fewer tasks are added, the more of each is kept (normalised)",
            pairs["normalised"],
            everything["normalised"],
        ),
        claim("negation: the target is forgotten (base above negated)", zero_target, target),
        claim("… and the control kept to 95 %", kept, [0.95 * value for value in zero_control]),
        claim("the analogy is better at D than the base", analogy["analogy"], analogy["zero-shot"]),
        claim("… and than C's own model", analogy["analogy"], analogy["finetuned on c"]),
    ]
    study.write_chapter(
        3,
        "arithmetic",
        title="Task arithmetic",
        text=[
            f"Each of {len(tasks)} tasks is finetuned apart, the image tower alone under the zero-shot "
            "head. Every pair and all of them are added to the base, with one scale each, chosen on "
            "held-out images; normalised is divided by the score of the task's own model. Negation takes "
            "the largest scale that keeps 95 % of the control's held-out accuracy.",
            f"The analogy: {letters['a']} is to {letters['b']} as {letters['c']} is to {letters['d']}; "
            "the scale was chosen on held-out images of the last, the models saw none of its training "
            "images.",
        ],
        tables=[
            {
                "caption": "Addition: mean accuracy on test images, %",
                "columns": ["model", "tasks", "absolute", "normalised"],
                "rows": added,
                "note": f"n = {study.setting['images']['test']} test images a task, seeds {study.seeds}; "
                f"{len(single)} pairs.",
            },
            {"caption": "Each pair, normalised, %", "columns": ["pair", "normalised"], "rows": single},
            {
                "caption": f"Negation: accuracy on test images, %; the control is {control}",
                "columns": [
                    "forgotten",
                    "scales",
                    "target before",
                    "target after",
                    "control before",
                    "control after",
                ],
                "rows": lost,
            },
            {
                "caption": f"Analogy: accuracy on test images of {letters['d']}, %",
                "columns": ["model", "accuracy"],
                "rows": [[name, interval(values)] for name, values in analogy.items()],
            },
            claims_table(claims, study.seeds),
        ],
        settings={"finetuning": str(study.setting["tasks"]["options"])},
    )
