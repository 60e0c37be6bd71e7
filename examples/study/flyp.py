"""FLYP (arXiv 2212.00638) against its rivals: full data and few shots, each method with its own learning "
"rate."""

from study import Job, Study, claim, claims_table, column, interval, weights
from wiseft import finetuned_by, name_of

Cell = tuple[str, str]
"""(regime, method): regime is "full", or how many images of a class."""


def run(study: Study) -> None:
    """Choose a learning rate for each method and regime on held-out images, then report on test images."""
    setting = study.setting["flyp"]
    task, lrs = setting["task"], setting["lrs"]
    cells = [(regime, method) for regime in ("full", *setting["few"]) for method in setting["methods"]]
    first, *others = study.seeds
    study.run(_finetune(study, cell, lr, first) for cell in cells for lr in lrs)
    files = [weights(_name(study, cell, lr, first)) for cell in cells for lr in lrs]
    held_out = study.scores("flyp/held-out", files, study.images("--data", task, "val", 0))
    best = {}
    for cell in cells:
        best[cell] = max(lrs, key=lambda lr: held_out[weights(_name(study, cell, lr, first))][task])
    study.run(_finetune(study, cell, best[cell], seed) for cell in cells for seed in others)
    names = (task, *(f"{task}@{shift}" for shift in study.setting["soups"]["shifts"]))
    data = [word for name in names for word in study.images("--data", name, "test")]
    paths = [
        study.base,
        *(weights(_name(study, cell, best[cell], seed)) for cell in cells for seed in study.seeds),
    ]
    _chapter(study, cells, best, study.scores("flyp/test", paths, data))


def _name(study: Study, cell: Cell, lr: float, seed: int) -> str:
    regime, method = cell
    if regime == "full":
        return name_of(study.setting["flyp"]["task"], method, lr, seed)
    return f"flyp/{regime}-{method}-{lr:g}-{seed}"


def _finetune(study: Study, cell: Cell, lr: float, seed: int) -> Job:
    regime, method = cell
    task = study.setting["flyp"]["task"]
    if regime == "full":
        return finetuned_by(study, task, method, lr, seed)
    images = study.images("--train", task, "train", 0)
    images += ["--shots", regime, "--val", f"{column(task)}={study.source(task, 'val')}"]
    options = {**study.setting["wiseft"]["options"], **study.setting["flyp"]["few"][regime]}
    return study.finetuned(_name(study, cell, lr, seed), images, options, method=method, lr=lr, seed=seed)


def _chapter(
    study: Study, cells: list[Cell], best: dict[Cell, float], scores: dict[str, dict[str, float]]
) -> None:
    setting = study.setting["flyp"]
    task = setting["task"]

    def side(cell: Cell, *, shifted: bool = False) -> list[float]:
        rows = [scores[weights(_name(study, cell, best[cell], seed))] for seed in study.seeds]
        return [
            sum(v for k, v in row.items() if k != task) / (len(row) - 1) if shifted else row[task]
            for row in rows
        ]

    zero = scores[study.base]
    shifts = [value for key, value in zero.items() if key != task]
    rows = [["–", "zero-shot", "–", f"{zero[task]:.1f}", f"{sum(shifts) / len(shifts):.1f}"]]
    for cell in cells:
        regime, method = cell
        data = "all images" if regime == "full" else f"{regime} a class"
        rows.append(
            [data, method, f"{best[cell]:g}", interval(side(cell)), interval(side(cell, shifted=True))]
        )
    claims = []
    for regime in dict.fromkeys(regime for regime, _ in cells):
        data = "all images" if regime == "full" else f"{regime} images a class"
        for rival in setting["methods"]:
            if rival != "flyp":
                left, right = (regime, "flyp"), (regime, rival)
                claims.append(claim(f"{data}: FLYP is better than {rival}", side(left), side(right)))
                claims.append(
                    claim(f"{data}: … and under shift", side(left, shifted=True), side(right, shifted=True))
                )
    study.write_chapter(
        6,
        "flyp",
        title="FLYP against its rivals",
        text=[
            f"{task}, finetuned by each method on all training images and on a few of each class. The "
            "learning rate of each row was chosen on held-out images among "
            f"{', '.join(f'{lr:g}' for lr in setting['lrs'])} with the first seed; few-shot runs keep the "
            "step with the best held-out loss.",
        ],
        tables=[
            {
                "caption": "Accuracy on test images, %",
                "columns": [
                    "training images",
                    "method",
                    "learning rate",
                    "in distribution",
                    "mean of the shifts",
                ],
                "rows": rows,
                "note": f"n = {study.setting['images']['test']} test images a column, seeds {study.seeds}.",
            },
            claims_table(claims, study.seeds),
        ],
        settings={"few shots": str(setting["few"])},
    )
