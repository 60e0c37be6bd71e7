"""Write the model card of a merged file: what the Hub reads (YAML), and what people read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.safetensors import read_header
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.report.documents import markdown
from clipmerge.weights.provenance import Parent, is_original, parents_of
from clipmerge.weights.record import read_record

TASK = "zero-shot-image-classification"

_USE = """## Use

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH/TO/THIS/FOLDER")
```

From the Hub, the name is `hf-hub:ORG/NAME`.
"""

Scores = Sequence[tuple[str, str, float, int | None]]
"""(data, metric, value, images) each."""


def model_card(name: str, weights: Path) -> str:
    """Return README.md for the merged file at `weights`, from the record that it carries.

    Args:
        name: the model's title.
    """
    record = read_record(read_header(weights)[0])
    parents = () if is_original(record) else parents_of(record)
    scores = _scores(record)
    model = record.get("model")
    kind = model.get("name") if isinstance(model, Mapping) else None
    intro = f"A CLIP model ({kind}), written by clipmerge.\n"
    if parents:
        many = f"{len(parents)} checkpoints" if len(parents) > 1 else "one checkpoint"
        intro = f"A CLIP model ({kind}), merged from {many} with clipmerge:\n\n```\n{record.get('notation')}\n```\n"
    sections = [_front_matter(name, record, parents, scores), f"# {name}\n", intro, _USE]
    if scores:
        rows = [(data, metric, f"{value:.4f}", n) for data, metric, value, n in scores]
        sections.append("## Scores\n\n" + markdown(("data", "metric", "value", "images"), rows))
    if parents:
        sections.append(_history(record, parents))
    return "\n".join(sections)


def shared_license(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return the license that all checkpoints state, in their record or the model card of their folder, else None."""
    stated = {_license_of(checkpoint) for checkpoint in checkpoints}
    return stated.pop() if len(stated) == 1 else None


def _license_of(checkpoint: Checkpoint) -> str | None:
    told = read_record(checkpoint.metadata).get("license")
    card = checkpoint.path / "README.md" if checkpoint.path is not None and checkpoint.path.is_dir() else None
    if told is None and card is not None and card.is_file():
        from huggingface_hub import ModelCard

        try:
            told = ModelCard.load(card, ignore_metadata_errors=True).data.license
        except (
            Exception
        ):  # a card of others may hold anything, and which library reads its YAML is its own affair
            return None
    return told if isinstance(told, str) and re.fullmatch(r"[A-Za-z0-9.+-]{1,60}", told) else None


def _front_matter(name: str, record: Mapping[str, Any], parents: Sequence[Parent], scores: Scores) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    fields: dict[str, Any] = {"license": record.get("license"), "tags": ["clip", "open_clip", "clipmerge"]}
    if parents:
        fields["tags"].append("merge")
        if published := _published(parents):
            fields |= {"base_model": published, "base_model_relation": "merge"}
        fields["merge_notation"] = str(record.get("notation", ""))
    if scores:
        fields["model_name"] = name
        fields["eval_results"] = [
            EvalResult(TASK, data, data, metric, value) for data, metric, value, _ in scores
        ]
    return f"---\n{ModelCardData(library_name='open_clip', pipeline_tag=TASK, **fields)}\n---\n"


def _published(parents: Sequence[Parent]) -> list[str]:
    """Return the parents that are the Hub's own models, as it names them: a local file's name means nothing there."""
    hub = [re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+?)(?:@.*)?", parent.file or "") for parent in parents]
    return list(dict.fromkeys(match.group(1) for match in hub if match))


def _scores(record: Mapping[str, Any]) -> Scores:
    """Return what the merge was selected by, then what else was recorded; records of others may hold anything."""
    scores = record.get("scores")
    entries: list[tuple[str, Any]] = [("held-out (selection)", record.get("selection"))]
    entries += sorted(scores.items()) if isinstance(scores, Mapping) else []
    rows = []
    for data, entry in entries:
        score = entry if isinstance(entry, Mapping) else {"value": entry}
        value, n = score.get("value"), score.get("n")
        if isinstance(value, int | float):
            images = n if isinstance(n, int) else None
            rows.append((str(data), str(score.get("metric", "top1")), float(value), images))
    return rows


def _history(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    rows = [(f"`{p.name}`", p.file, f"`{p.digest[:16]}…`" if p.digest else None) for p in parents]
    selection, how = record.get("selection"), ""
    if isinstance(selection, Mapping):
        plain = [f"{key} {value}" for key, value in selection.items() if isinstance(value, str | int | float)]
        how = f"\nSelected by: {', '.join(plain)}.\n"
    return (
        f"## How it was made\n\n{markdown(('name', 'file', 'content digest'), rows)}{how}\n"
        f"clipmerge {record.get('version')} wrote it, dtype policy `{record.get('dtype')}`. With the parents at\n"
        f"hand, `clipmerge verify open_clip_model.safetensors --parents DIR` computes it again, bit for bit.\n"
    )
