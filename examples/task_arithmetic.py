"""Task arithmetic: what finetuning learned is a vector, which can be added, subtracted and scaled."""

import clipmerge as cm

base, low, high = (
    cm.load(f"clipmerge-demo/{name}.safetensors") for name in ("base", "tasks/low", "tasks/high")
)
models = {
    "base": base,
    "both tasks": base + 0.3 * ((low - base) + (high - base)),
    "low forgotten": base - 0.5 * (low - base),
}
evaluator = cm.Evaluator(
    {name: cm.open_split(f"clipmerge-demo/data/{name}.npz#test") for name in ("low", "high")},
    templates='a photo of the number: "{}".',
)
for name, model in models.items():
    scores = evaluator.scores(model)
    print(
        f"{name:14} low {100 * scores['low'].value:5.1f}  high {100 * scores['high'].value:5.1f}  {model!r}"
    )

(low - base).save(
    "clipmerge-demo/example-low.tv.safetensors", force=True
)  # a task vector is a file of its own
