"""Model recycling: start the target's finetunings from models of other tasks, with one shared head, and average.

Source: Ramé et al. 2023, arXiv 2212.10445 (Ratatouille).
"""

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
auxiliary = [cm.load(f"clipmerge-demo/tasks/{task}.safetensors") for task in ("low", "high", "blurred")]
target, test = cm.open_split("digits#train"), cm.open_split("digits#test")

out = "clipmerge-demo/example-{}.safetensors"
probe = cm.finetune(base, target, out=out.format("probe"), method="linear-probe", force=True)
recycled = [
    cm.finetune(
        start, target, out=out.format(f"recycled{i}"), method="ce", head=probe,
        lr=1e-3, steps=20, batch_size=64, force=True,
    )
    for i, start in enumerate(auxiliary)
]  # fmt: skip

evaluator = cm.Evaluator(test)
print(f"probe of the base   {100 * evaluator.score(probe).value:.1f}")
for i, weights in enumerate(recycled):
    print(f"recycled {i}          {100 * evaluator.score(weights).value:.1f}")
print(f"mean of all three   {100 * evaluator.score(cm.mean(recycled)).value:.1f}")
