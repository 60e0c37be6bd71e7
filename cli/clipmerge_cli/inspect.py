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
    listing: list[dict[str, Any]] = [
        {"name": name, "dtype": t.dtype, "shape": list(t.shape), "nonfinite": nonfinite.get(name, 0)}
        for name, t in checkpoint.tensors.items()
    ]
    if talk.json:
        more = {"all_tensors": listing} if tensors else {}
        show.document({**summary.to_json(), "model": weights.model, **more})
        return
    _show(summary, weights.model)
    if tensors:
        rows = [
            (t["name"], t["dtype"], "×".join(map(str, t["shape"])) or "scalar", t["nonfinite"])
            for t in listing
        ]
        show.table(("tensor", "dtype", "shape", "not finite"), rows)


def _show(summary: "Summary", model: Mapping[str, Any] | None) -> None:
    from rich.console import Console

    facts = [
        ("file", summary.path or summary.name),
        ("holds", f"{summary.kind}, {summary.tensors} tensors, {summary.parameters:,} parameters"),
        ("layout", summary.layout),
        ("dtypes", show.counts(summary.dtypes)),
        ("size", show.size(summary.nbytes)),
        ("model", str(model.get("name")) if model else "not recorded"),
        ("digest", summary.digest or "not computed"),
        ("not finite", _nonfinite(summary.nonfinite)),
    ]
    print(show.plain("\n".join(f"{label:<11} {value}" for label, value in facts)))
    print()
    whole_lines = Console(width=10_000, soft_wrap=True, highlight=False, markup=False)
    whole_lines.print(tree(summary))
    rows = [
        (show.part(p.tower, p.block), p.tensors, f"{p.parameters:,}", show.counts(p.dtypes), show.size(p.nbytes),
         p.nonfinite)
        for p in summary.parts
    ]  # fmt: skip
    show.table(("part", "tensors", "parameters", "dtypes", "size", "not finite"), rows, title="Tensors")


def _nonfinite(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "not counted"
    if not counts:
        return "none"
    names = and_more([f"{name} ({count})" for name, count in counts.items()], 5)
    return f"{sum(counts.values())} values in {len(counts)} tensors: {names}"


def tree(summary: "Summary") -> "Tree":
    """How the file was made, and its parents, and theirs."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(show.plain(_made(summary.name, summary.record))))
    _grow(root, summary.record)
    return root


def _grow(branch: "Tree", record: Mapping[str, Any]) -> None:
    from rich.text import Text

    from clipmerge.weights.provenance import bases_of, is_original, parents_of

    for parent in () if is_original(record) else parents_of(record):
        what = _made(f"{parent.name}: {_file(parent)}", parent.made)
        _grow(branch.add(Text(show.plain(what))), parent.made)
    for base in bases_of(record):
        branch.add(Text(show.plain(f"trained from: {_file(base)}")))


def _file(parent: "Parent") -> str:
    """Its name and the beginning of its digest."""
    digest = f"  {parent.digest[:12]}…" if parent.digest else ""
    return (parent.file or "in memory") + digest


def _made(what: str, record: Mapping[str, Any]) -> str:
    """One line, or a few: the notation, and what was recorded about training and selection."""
    from clipmerge.weights.provenance import is_original

    lines = [what]
    if "notation" in record and not is_original(record):
        lines[0] += f" = {record['notation']}"
        if record.get("dtype", "base") != "base":
            lines[0] += f" as {record['dtype']}"
    elif not record:
        lines[0] += "  (no record)"
    lines += [
        f"{key}: {_brief(record[key])}" for key in ("training", "selection", "scores") if record.get(key)
    ]
    return "\n".join(lines)


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if isinstance(v, str | int | float | bool)}
        return ", ".join(f"{key}={shown}" for key, shown in plain.items()) or "recorded"
    return str(value)[:120]
