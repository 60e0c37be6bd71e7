"""Draw many models in one figure: in-distribution score on x, score under shift on y."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, figure, percent

Document = Mapping[str, Any]

_MARKS: Mapping[str, tuple[str, str, float, str]] = {
    "base": ("s", BLACK, 9, "base"),
    "ingredient": ("o", GREY, 6, "finetuned, each one"),
    "best": ("D", VERMILION, 9, "best single (held-out)"),
    "uniform": ("^", BLUE, 11, "uniform soup"),
    "greedy": ("*", ORANGE, 17, "greedy soup"),
    "ensemble": ("P", GREEN, 10, "logit ensemble"),
    "wise-ft": ("X", PURPLE, 11, "WiSE-FT, α chosen on held-out"),
}
"""Role → marker, colour, size and words."""


def comparison(document: Document, path: str | Path) -> None:
    """Draw `{"x", "y": split names, "rows": [{"role", "scores"}], "curve": [{"alpha", "scores"}]}`."""
    x, y = document["x"], document["y"]
    with figure(path, width=7.2, height=4.8) as page:
        axes = page.add_subplot()
        curve = document.get("curve") or []
        if curve:
            axes.plot([p["scores"][x] for p in curve], [p["scores"][y] for p in curve], "-", color=SKY,
                      marker=".", label="WiSE-FT, one point per α", zorder=1)  # fmt: skip
        for role, (marker, colour, size, label) in _MARKS.items():
            rows = [row["scores"] for row in document["rows"] if row["role"] == role]
            if rows:
                axes.plot([s[x] for s in rows], [s[y] for s in rows], marker, color=colour, markersize=size,
                          markeredgecolor="white" if role == "ingredient" else BLACK, markeredgewidth=0.7,
                          linestyle="none", label=label)  # fmt: skip
        axes.set_title("Every model by its score in distribution and under shift")
        axes.set_xlabel(f"in-distribution: {document.get('labels', {}).get(x, x)}, top-1 %")
        axes.set_ylabel(f"shift: {document.get('labels', {}).get(y, y)}, top-1 %")
        percent(axes, "xy")
        axes.legend(loc="best")
