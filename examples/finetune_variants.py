"""Ingredients of a soup: one base, a few learning rates, then the mean of what they became."""

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
train, test = cm.open_split("digits#train"), cm.open_split("digits#test")
evaluator = cm.Evaluator(test)

variants = [
    cm.finetune(
        base,
        train,
        out=f"clipmerge-demo/example-lr{lr}.safetensors",
        lr=lr,
        steps=20,
        batch_size=64,
        force=True,
    )
    for lr in (3e-4, 1e-3, 3e-3)
]
for weights in (base, *variants, cm.mean(variants)):
    print(f"{100 * evaluator.score(weights).value:5.1f}  {weights!r}")
