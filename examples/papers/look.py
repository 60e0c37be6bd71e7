"""Read what `clipmerge evaluate -o scores.json` wrote: the best checkpoint, or whether an ordering is there.

python look.py best SCORES SPLIT                      prints the path of the checkpoint with the best score
python look.py order SCORES CLAIM LEFT ">" RIGHT     prints both sides and whether the published ordering appeared

LEFT and RIGHT are "CHECKPOINT on SPLIT"; several splits, joined by +, count by their mean.
"""

import json
import sys
from pathlib import Path
from statistics import mean


def best(scores: dict[str, dict[str, float]], paths: dict[str, str], split: str) -> str:
    """Return the path of the best on a split, the first of them on a tie."""
    return paths[max(scores, key=lambda name: scores[name][split])]


def order(scores: dict[str, dict[str, float]], claim: str, left: str, sign: str, right: str) -> str:
    """Return the claim, both sides in %, and whether it appeared."""
    values = []
    for side in (left, right):
        name, splits = side.split(" on ")
        values.append(100 * mean(scores[name][split] for split in splits.split("+")))
    ahead = values[0] - values[1] if sign == ">" else values[1] - values[0]
    verdict = "appeared" if ahead > 0 else "equal" if ahead == 0 else "did not appear"
    return f"published: {claim}\n     here: {left} {values[0]:.2f}, {right} {values[1]:.2f}: {verdict}"


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    rows = json.loads(Path(file).read_text(encoding="utf-8"))["checkpoints"]
    scored = {row["name"]: {split: s["value"] for split, s in row["scores"].items()} for row in rows}
    print(
        best(scored, {row["name"]: row["path"] for row in rows}, *rest)
        if what == "best"
        else order(scored, *rest)
    )
