"""A greedy soup: best first, each checkpoint stays in the mean if the held-out score does not fall."""

from pathlib import Path

import clipmerge as cm

checkpoints = sorted(Path("clipmerge-demo/ft").glob("*.safetensors"))
evaluator = cm.Evaluator({"val": cm.open_split("digits#val"), "test": cm.open_split("digits#test")})

soup = cm.greedy_soup(checkpoints, evaluator)
for step in soup.history:
    with_it = "cannot win" if step.value is None else f"{100 * step.value:.2f}"
    print(f"{step.number}. {step.name}: {with_it}, {'kept' if step.accepted else 'left out'}")

print(f"{soup.weights!r} scores {100 * evaluator.score(soup.weights, 'test').value:.2f} on test")
soup.weights.save("clipmerge-demo/example-soup.safetensors", force=True)
