"""`clipmerge inspect`: what a checkpoint holds and how it was made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clipmerge.text import and_more
from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import Talk

if TYPE_CHECKING:
    from rich.tree import Tree

    from clipmerge.weights.look import Summary
    from clipmerge.weights.provenance import Parent


def inspect(
    *,
    file: str = arg("FILE", "A checkpoint: file, folder, hf-hub:ORG/NAME."),
    talk: Talk,
    tensors: bool = opt(False, "List every tensor."),
    headers: bool = opt(False, "Read headers only: no digest, no count of NaN."),
) -> None:
    """What a checkpoint holds and how it was made.

    Its provenance through the generations, its model, and its tensors by tower and block: sizes, dtypes,
    values that are not finite.

    Example: [bold]clipmerge inspect soup.safetensors[/bold]
    """
    from clipmerge.weights.look import inspect as summarise
    from clipmerge.weights.weights import load

    weights = load(file)
    (checkpoint,) = weights.checkpoints
    with talk.progress() as on_progress:
        summary = summarise(checkpoint, headers=headers, on_progress=on_progress)
    nonfinite = summary.nonfinite or {}
    listing = [(n, t.dtype, list(t.shape), nonfinite.get(n, 0)) for n, t in checkpoint.tensors.items()]
    if talk.json:
        keys = ("name", "dtype", "shape", "nonfinite")
        more = {"all_tensors": [dict(zip(keys, row, strict=True)) for row in listing]} if tensors else {}
        show.document({**summary.to_json(), "model": weights.model, **more})
        return
    _show(summary, weights.model)
    if tensors:
        rows = [(n, dtype, "×".join(map(str, shape)) or "scalar", bad) for n, dtype, shape, bad in listing]
        show.table(("tensor", "dtype", "shape", "not finite"), rows)


def _show(summary: "Summary", model: Mapping[str, Any] | None) -> None:
    from rich.console import Console

    facts = {
        "file": summary.path or summary.name,
        "holds": f"{summary.kind}, {summary.tensors} tensors, {summary.parameters:,} parameters",
        "layout": summary.layout,
        "dtypes": show.counts(summary.dtypes),
        "size": show.size(summary.nbytes),
        "model": str(model.get("name")) if model else "not recorded",
        "digest": summary.digest or "not computed",
        "not finite": _nonfinite(summary.nonfinite),
    }
    print(show.plain("\n".join(f"{label:<11} {value}" for label, value in facts.items())), end="\n\n")
    Console(width=10_000, soft_wrap=True, highlight=False, markup=False).print(tree(summary))
    rows = [
        (
            show.part(part.tower, part.block),
            part.tensors,
            f"{part.parameters:,}",
            show.counts(part.dtypes),
            show.size(part.nbytes),
            part.nonfinite,
        )
        for part in summary.parts
    ]
    show.table(("part", "tensors", "parameters", "dtypes", "size", "not finite"), rows, title="Tensors")


def _nonfinite(counts: Mapping[str, int] | None) -> str:
    if not counts:
        return "not counted" if counts is None else "none"
    names = and_more([f"{name} ({count})" for name, count in counts.items()], 5)
    return f"{sum(counts.values())} values in {len(counts)} tensors: {names}"


def tree(summary: "Summary") -> "Tree":
    """Draw how the file was made, and its parents, and theirs."""
    return _branch(summary.name, summary.record)


def _branch(label: str, record: Mapping[str, Any]) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    from clipmerge.weights.provenance import bases_of, is_original, parents_of

    lines = [label]
    if "notation" in record and not is_original(record):
        dtype = record.get("dtype", "base")
        lines[0] += f" = {record['notation']}" + ("" if dtype == "base" else f" as {dtype}")
    elif not record:
        lines[0] += "  (no record)"
    lines += [
        f"{key}: {_brief(record[key])}" for key in ("training", "selection", "scores") if record.get(key)
    ]
    branch = Tree(Text(show.plain("\n".join(lines))))
    for parent in () if is_original(record) else parents_of(record):
        branch.children.append(_branch(f"{parent.name}: {_file(parent)}", parent.made))
    for base in bases_of(record):
        branch.add(Text(show.plain(f"trained from: {_file(base)}")))
    return branch


def _file(parent: "Parent") -> str:
    digest = f"  {parent.digest[:12]}…" if parent.digest else ""
    return (parent.file or "in memory") + digest


def _brief(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)[:120]
    pairs = (f"{key}={item}" for key, item in value.items() if isinstance(item, str | int | float | bool))
    return ", ".join(pairs) or "recorded"
