"""WiSE-FT: between a robust base and an accurate finetuning lies a model that is better than either."""

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
finetuned = cm.load("clipmerge-demo/ft/ft2.safetensors")

evaluator = cm.Evaluator(
    {"id": cm.open_split("digits#test"), "shift": cm.open_split("digits#test@rotate:25")},
)
print("alpha   test  turned by 25 degrees")
for alpha in (0, 0.25, 0.5, 0.75, 1):
    scores = evaluator.scores(cm.interpolate(base, finetuned, alpha))
    print(f"{alpha:5}  {100 * scores['id'].value:5.1f}  {100 * scores['shift'].value:5.1f}")

cm.interpolate(base, finetuned, 0.5).save("clipmerge-demo/example-wise-ft.safetensors", force=True)
