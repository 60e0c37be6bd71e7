"""PAINT: finetune on what the model is bad at, then go only as far as both tasks are served."""

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
blurred = cm.load("clipmerge-demo/tasks/blurred.safetensors")
evaluator = cm.Evaluator(
    {"patch": cm.open_split("digits#val@blur:1.5"), "supported": cm.open_split("digits#val")}
)

patched = cm.patch(base, blurred, evaluator, grid=(0, 0.25, 0.5, 0.75, 1))
for point in patched.history:
    scores = {name: f"{100 * score.value:.1f}" for name, score in point.scores.items()}
    print(point.coefficient, scores, "chosen" if point is patched.chosen else "")

patched.weights.save("clipmerge-demo/example-patched.safetensors", force=True)
