"""A coefficient for each part: names are matched by patterns, a name that none matches keeps the base's value."""

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
finetuned = cm.load("clipmerge-demo/ft/ft2.safetensors")
choices = {
    "image tower only": {"visual": 1.0},
    "text tower only": {"text": 1.0},
    "later blocks more": {"visual.block[0:2]": 0.2, "visual.block[2:3]": 0.8, "*": 0.5},
}
evaluator = cm.Evaluator(cm.open_split("digits#test"))
for name, alpha in choices.items():
    print(f"{name:18} {100 * evaluator.score(cm.interpolate(base, finetuned, alpha)).value:.1f}")
