"""Write the model card of a merged file: what the Hub reads (YAML), and what people read."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.safetensors import read_header
from clipmerge.report.documents import markdown
from clipmerge.weights.provenance import Parent, is_original, parents_of
from clipmerge.weights.record import read_record

TASK = "zero-shot-image-classification"

_USE = (
    "## Use\n\n```python\nimport open_clip\n\n"
    'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH/TO/THIS/FOLDER")\n'
    "```\n\nFrom the Hub, the name is `hf-hub:ORG/NAME`.\n"
)


def model_card(name: str, weights: Path) -> str:
    """Return README.md for the merged file at `weights`, from the record that it carries.

    Args:
        name: the model's title.
    """
    record = read_record(read_header(weights)[0])
    parents = () if is_original(record) else parents_of(record)
    sections = [
        _front_matter(name, record, parents),
        f"# {name}\n",
        _intro(record, parents),
        _USE,
        _scores(record),
        _history(record, parents),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(name: str, record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    """Return the YAML; text is written as JSON strings, which YAML reads as they are."""
    lines = ["---", "library_name: open_clip", f"pipeline_tag: {TASK}", "tags:"]
    lines += [f"- {tag}" for tag in ("clip", "open_clip", "clipmerge", *(("merge",) if parents else ()))]
    if parents:
        lines += ["base_model:", *(f"- {_text(base)}" for base in _bases(parents))]
        lines += ["base_model_relation: merge", f"merge_notation: {_text(str(record.get('notation', '')))}"]
    scores = _listed_scores(record)
    if scores:
        lines += ["model-index:", f"- name: {_text(name)}", "  results:"]
    for data, metric, value, _ in scores:
        lines += ["  - task:", f"      type: {TASK}", "    dataset:", f"      name: {_text(data)}"]
        lines += [f"      type: {_text(data)}", "    metrics:"]
        lines += [f"    - type: {_text(metric)}", f"      value: {json.dumps(value)}"]
    return "\n".join([*lines, "---", ""])


def _bases(parents: Sequence[Parent]) -> list[str]:
    """Return the parents as the Hub names models: `org/name` where they came from there, else the file's stem."""
    names = []
    for parent in parents:
        file = parent.file or parent.name
        hub = re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+?)(?:@.*)?", file)
        stem = re.sub(r"\.(safetensors(\.index\.json)?|pt|pth|bin)$", "", file)
        names.append(hub.group(1) if hub else re.sub(r"[^\w.-]+", "-", stem).strip("-.") or parent.name)
    return list(dict.fromkeys(names))


def _intro(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    model = record.get("model")
    kind = model.get("name") if isinstance(model, Mapping) else None
    if not parents:
        return f"A CLIP model ({kind}), written by clipmerge.\n"
    many = f"{len(parents)} checkpoints" if len(parents) > 1 else "one checkpoint"
    return (
        f"A CLIP model ({kind}), merged from {many} with clipmerge:\n\n```\n{record.get('notation')}\n```\n"
    )


def _scores(record: Mapping[str, Any]) -> str:
    rows = [(data, metric, f"{value:.4f}", n) for data, metric, value, n in _listed_scores(record)]
    if not rows:
        return ""
    return "## Scores\n\n" + markdown(("data", "metric", "value", "images"), rows)


def _listed_scores(record: Mapping[str, Any]) -> list[tuple[str, str, float, int | None]]:
    """Return (data, metric, value, images): what the merge was selected by, then what else was recorded."""
    scores = record.get("scores")
    entries: list[tuple[str, Any]] = [("held-out (selection)", record.get("selection"))]
    entries += sorted(scores.items()) if isinstance(scores, Mapping) else []
    rows = []
    for data, entry in entries:
        score = entry if isinstance(entry, Mapping) else {"value": entry}
        value, n = score.get("value"), score.get("n")
        if isinstance(value, int | float):
            rows.append(
                (str(data), str(score.get("metric", "top1")), float(value), n if isinstance(n, int) else None)
            )
    return rows


def _history(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    if not parents:
        return ""
    rows = [(f"`{p.name}`", p.file, f"`{p.digest[:16]}…`" if p.digest else None) for p in parents]
    selection = record.get("selection")
    how = ""
    if isinstance(selection, Mapping):
        plain = {key: value for key, value in selection.items() if isinstance(value, str | int | float)}
        how = f"\nSelected by: {', '.join(f'{key} {value}' for key, value in plain.items())}.\n"
    return (
        "## How it was made\n\n"
        + markdown(("name", "file", "content digest"), rows)
        + how
        + f"\nclipmerge {record.get('version')} wrote it, dtype policy `{record.get('dtype')}`. With the parents at\n"
        f"hand, `clipmerge verify open_clip_model.safetensors --parents DIR` computes it again, bit for bit.\n"
    )


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
