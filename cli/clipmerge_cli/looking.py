"""The commands that look and check: evaluate, inspect, compare, verify."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.filesize import decimal as size
from rich.text import Text
from rich.tree import Tree

import clipmerge
from clipmerge.errors import CheckpointError
from clipmerge.evaluate.metrics import METRICS
from clipmerge.evaluate.score import Score
from clipmerge.evaluate.verify import verify as verify_file
from clipmerge.report.page import report_page
from clipmerge.report.scores import check_scores_file, mean_scores, save_scores, scores_by_data
from clipmerge.text import and_more
from clipmerge.weights.labels import names_of
from clipmerge.weights.look import Comparison, Summary
from clipmerge.weights.look import compare as compare_weights
from clipmerge.weights.look import inspect as summarise
from clipmerge.weights.provenance import Parent, bases_of, is_original, parents_of
from clipmerge.weights.task_vectors import TaskVectors, compare_tasks, summary_rows
from clipmerge.weights.verify import Verdict
from clipmerge.weights.weights import load, load_all, load_leaf
from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import DEVICE, FORCE, INPUT, OUTPUT, PLOT, SCORING, TEXT_TOWER, Talk, listed, named
from clipmerge_cli.scoring import Scoring, open_journal


def evaluate(
    *,
    checkpoints: list[str] = arg(
        "CKPT...", "Checkpoints: files, folders, hf-hub:ORG/NAME; @LIST: a file's lines."
    ),
    data: list[str] = opt(
        ..., "Labelled images, or NAME=DATA; repeat; @LIST: a file's lines.", INPUT, metavar="DATA"
    ),
    text_tower: str | None = TEXT_TOWER,
    scoring: Scoring,
    talk: Talk,
    output: Path | None = opt(
        None, "Also write the scores: .csv, .md or .json.", OUTPUT, "--output", "-o", metavar="FILE"
    ),
    force: bool = FORCE,
    skip_existing: bool = opt(False, "Take the scores that are remembered.", SCORING),
    journal: Path | None = opt(
        None, "Where scores are remembered; with --skip-existing the cache.", SCORING, metavar="FILE"
    ),
) -> None:
    """Score checkpoints on labelled images, with 95 % intervals: a leaderboard of checkpoints and data.

        clipmerge evaluate ckpts/*.safetensors --model ViT-B-32 --data images/
        clipmerge evaluate soup.safetensors --data id=digits#test \\
          --data shift=digits#test@rotate:30
        clipmerge evaluate @ckpts.txt --data @data.txt --skip-existing -o scores.csv

    A checkpoint that holds a trained head is scored by it, any other by a zero-shot head built from prompts: those
    that it records for such classes, unless --templates says otherwise. p is McNemar's: how surprising the difference
    to the first checkpoint would be, were both equally good. The CSV has CLIP_benchmark's columns.
    """
    data, checkpoints = listed(data), listed(checkpoints)
    sources = named(data, "--data", data)
    if output is not None:
        check_scores_file(output, force=force)
    weights, scoring = load_all(checkpoints, base=text_tower), replace(scoring, text_tower=text_tower)
    remembered = None
    if journal or skip_existing:
        again = "the same without --skip-existing"
        remembered = open_journal(journal, talk, fresh=not skip_existing, anew=again)
    names = names_of(weights)
    how: dict[str, Any] = {"role": "test", "models": weights, "as_one": False, "journal": remembered}
    with scoring.evaluator(sources, talk, **how) as (evaluator, _):
        evaluator.expect(weights)
        scores = [evaluator.scores(w) for w in weights]
        setups = [{name: evaluator.setup(w, name) for name in sources} for w in weights]
    if not show.is_first():
        return
    rows = []
    for name, path, row, used in zip(names, checkpoints, scores, setups, strict=True):
        rows.append({
            "name": name,
            "path": path,
            "model": next(iter(used.values())).spec.name,
            "prompts": {split: setup.to_json() for split, setup in used.items()},
            "scores": {split: {**s.to_json(), "p": s.p_value(scores[0][split])} for split, s in row.items()},
            "mean": mean_scores({split: score.metrics for split, score in row.items()}),
        })  # fmt: skip
    document = {"kind": "evaluation", "metric": evaluator.metric, "data": sources, "checkpoints": rows}
    written = None if output is None else save_scores(document, output, force=force)
    if talk.json:
        show.document(document | ({"output": written} if written else {}))
    else:
        _scores_table(names, scores, evaluator.metric)
        if len(sources) > 1:
            title = f"{_titles(evaluator.metrics.values())}, best mean first"
            columns, cells = scores_by_data(document)
            show.table(columns, cells, title=title)
    known = sum(score.images_scored == 0 for row in scores for score in row.values())
    if known:
        talk.say(f"{known} of {len(weights) * len(sources)} scores were remembered")
    if written:
        talk.say(f"wrote {show.short(written)}")


def _scores_table(names: Sequence[str], scores: Sequence[Mapping[str, Score]], metric: str) -> None:
    every = [score for row in scores for score in row.values()]
    others = [name for name in METRICS if name != metric and all(name in score.metrics for score in every)]
    compares = ["p"] if len(names) > 1 else []
    kinds = {METRICS[score.metric].retrieval for score in every}
    counted = "images or queries" if len(kinds) > 1 else "queries" if kinds == {True} else "images"
    columns = ["checkpoint", "data", counted, _titles(score.metric for score in every), "95 %", *compares]
    rows: list[list[object]] = []
    for name, row in zip(names, scores, strict=True):
        for split, score in row.items():
            cells = [name, split, score.n, show.percent(score.value), show.interval(score.interval)]
            if compares:
                cells.append("" if row is scores[0] else f"{score.p_value(scores[0][split]):.2g}")
            rows.append(cells + [show.percent(score.metrics[name]) for name in others])
    show.table([*columns, *(METRICS[name].title for name in others)], rows)


def _titles(metrics: Iterable[str]) -> str:
    """Return what a column of scores is called; data with captions has another metric than data with classes."""
    return " or ".join(dict.fromkeys(METRICS[metric].title for metric in metrics))


def inspect(
    *,
    file: str = arg("FILE", "A checkpoint: file, folder, hf-hub:ORG/NAME."),
    talk: Talk,
    tensors: bool = opt(False, "List the tensors, by tower and block and each one."),
    headers: bool = opt(False, "Read headers only: no digest, no count of NaN."),
) -> None:
    """What a checkpoint holds and how it was made.

    Its provenance through the generations, then its model, size, dtypes, digest and values that are not finite;
    with --tensors what each tower, block and tensor is.

    Example: [bold]clipmerge inspect soup.safetensors[/bold]
    """
    weights = load_leaf(file)
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
    _show(summary, weights.model, why=checkpoint.extra.get("untranslated"), tensors=tensors)
    if tensors:
        rows = [(n, dtype, "×".join(map(str, shape)) or "scalar", bad) for n, dtype, shape, bad in listing]
        show.table(("tensor", "dtype", "shape", "not finite"), rows)


def _show(summary: Summary, model: Mapping[str, Any] | None, *, why: str | None, tensors: bool) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
    console.print(tree(summary.name, summary.record))
    print()
    bad = summary.nonfinite or {}
    listed = and_more([f"{name} ({count})" for name, count in bad.items()], 5)
    unknown = f"none of open_clip's: {why}" if why else "not recorded"
    none = "not counted" if summary.nonfinite is None else "none"
    facts = {
        "file": summary.path or summary.name,
        "holds": f"{summary.kind}, {summary.tensors} tensors, {summary.parameters:,} parameters",
        "layout": summary.layout,
        "dtypes": show.counts(summary.dtypes),
        "size": size(summary.nbytes),
        "model": str(model.get("name") or "a tower, without a name") if model else unknown,
        "digest": summary.digest or "not computed",
        "not finite": f"{sum(bad.values())} values in {len(bad)} tensors: {listed}" if bad else none,
    }
    print(show.plain("\n".join(f"{label:<11} {value}" for label, value in facts.items())))
    if not tensors:
        return
    rows = []
    for part in summary.parts:
        name, dtypes, nbytes = show.part(part.tower, part.block), show.counts(part.dtypes), size(part.nbytes)
        rows.append((name, part.tensors, f"{part.parameters:,}", dtypes, nbytes, part.nonfinite))
    print()
    show.table(("part", "tensors", "parameters", "dtypes", "size", "not finite"), rows, title="Tensors")


def tree(label: str, record: Mapping[str, Any]) -> Tree:
    """Draw how a file was made, from its record, and its parents, and theirs."""
    lines = [label]
    if "notation" in record and not is_original(record):
        dtype = record.get("dtype", "base")
        lines[0] += f" = {record['notation']}" + ("" if dtype == "base" else f" as {dtype}")
    elif not record:
        lines[0] += "  (no record)"
    if isinstance(selection := record.get("selection"), Mapping):
        lines.append(_chosen(selection))
    if isinstance(training := record.get("training"), Mapping):
        lines.append(_trained(training))
    lines += [f"scores: {_brief(record['scores'])}"] if record.get("scores") else []
    branch = Tree(Text(show.plain("\n".join(lines))))
    for parent in () if is_original(record) else parents_of(record):
        branch.children.append(tree(f"{parent.name}: {_file(parent)}", parent.made))
    for base in bases_of(record):
        branch.add(Text(show.plain(f"trained from: {_file(base)}")))
    return branch


def _chosen(selection: Mapping[str, Any]) -> str:
    """Say how a merge was chosen: `chosen by greedy soup on digits#val: top1 95.00 % of 400 images`."""
    by, data = (
        str(selection.get("by", "?")).replace("_", " "),
        selection.get("data", "images that are not named"),
    )
    value, n = selection.get("value"), selection.get("n")
    score = (
        f": {selection.get('metric', 'score')} {show.percent(value)} %" if isinstance(value, float) else ""
    )
    return f"chosen by {by} on {data}{score}{f' of {n} images' if score and n else ''}"


def _trained(training: Mapping[str, Any]) -> str:
    """Say how a checkpoint was trained, the hyperparameters that differ from the defaults among it."""
    from clipmerge.finetuning.settings import Settings

    plain = {k: v for k, v in training.items() if isinstance(v, str | int | float | bool)}
    usual = {f.name: f.default for f in fields(Settings)}
    first = [f"{plain.pop(name)} {name}" for name in ("images", "steps") if name in plain]
    rest = [
        f"{k} {v}"
        for k, v in plain.items()
        if k not in ("method", "step") and (k == "lr" or usual.get(k) != v)
    ]
    return f"trained by {plain.get('method', '?')}: {', '.join([*first, *rest])}".removesuffix(": ")


def _file(parent: Parent) -> str:
    digest = f"  {parent.digest[:12]}…" if parent.digest else ""
    return (parent.file or "in memory") + digest


def _brief(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)[:120]
    pairs = (f"{key}={item}" for key, item in value.items() if isinstance(item, str | int | float | bool))
    return ", ".join(pairs) or "recorded"


def compare(
    *,
    checkpoints: list[str] = arg("CKPT...", "Two checkpoints of one model, or with --base more."),
    talk: Talk,
    scoring: Scoring,
    base: str | None = opt(None, "What they came from: looks at their task vectors.", metavar="CKPT"),
    data: str | None = opt(
        None, "Of two: images to score along the segment between them.", INPUT, metavar="DATA"
    ),
    plot: Path | None = PLOT,
) -> None:
    """How far apart checkpoints are, by tower and block, before they are merged.

    Of two: the distance, which is the norm of A - B divided by the norm of A, over the towers that both have. With
    --base their task vectors: norms, cosines, sign conflicts, the share of exact zeros; and warnings of what would
    spoil a merge. With --data the barrier between two: how far scores fall below the line between the ends.

        clipmerge compare cars.safetensors dtd.safetensors --base zs.safetensors
        clipmerge compare cars.safetensors dtd.safetensors svhn.safetensors \\
          --base zs.safetensors --plot tasks.png
    """
    if len(checkpoints) < 2 or (len(checkpoints) > 2 and not base):
        raise typer.BadParameter("two checkpoints, or more with --base", param_hint="CKPT...")
    if (data and len(checkpoints) > 2) or (plot and not base):
        hint = "--data" if data else "--plot"
        raise typer.BadParameter("--data is of two checkpoints, --plot needs --base", param_hint=hint)
    two = len(checkpoints) == 2
    origin = load(base, "base") if base else None
    if two:
        models = [load(c, name, base=origin) for c, name in zip(checkpoints, "ab", strict=True)]
    else:
        models = load_all(checkpoints, base=origin)
    document: dict[str, Any] = {}
    with talk.progress() as on_progress:
        if two:
            comparison = compare_weights(models[0], models[1], origin, on_progress=on_progress)
            document |= {**comparison.to_json(), "a": checkpoints[0], "b": checkpoints[1], "base": base}
        if origin is not None:
            found = compare_tasks(origin, models, on_progress=on_progress)
            document |= {"base": base, "task_vectors": found.to_json()}
    if data:
        from clipmerge.search.barrier import barrier

        setup = scoring.evaluator({"images": data}, talk, role="val", models=models, as_one=True)
        with setup as (evaluator, _):
            between = barrier(models[0], models[1], evaluator)
        document["barrier"] = between.to_json()
    if plot and origin is not None:
        drawn = clipmerge.plot(found.to_json(), plot)
        document["figures"] = drawn
    if talk.json:
        show.document(document)
        return
    if origin is not None:
        _show_tasks(found, talk)
    if data:
        rows = [(f"{alpha:g}", show.percent(s.value)) for alpha, s in between.scores.items()]
        show.table(("alpha", "score"), rows, title="Between the two")
        print(f"barrier: {show.percent(between.height)} points at alpha {between.alpha:g}")
    if two:
        _show_distances(comparison, found if origin is not None else None)


def _show_distances(comparison: Comparison, found: TaskVectors | None) -> None:
    columns = ("part", "tensors", "parameters", "distance", "largest")
    vectors = ("|A - base|", "|B - base|", "cosine", "sign conflicts, %") if found else ()
    agreements = {(p.tower, p.block): p.conflicts[0][1] for p in (*found.parts, found.whole)} if found else {}
    rows: list[Sequence[object]] = []
    for part in (*comparison.parts, comparison.whole):
        where = "all" if part.tower is None else show.part(part.tower, part.block)
        row = (where, part.tensors, f"{part.parameters:,}", part.relative, part.largest)
        conflicts = agreements.get((part.tower, part.block))
        shown = None if conflicts is None else show.percent(conflicts)
        rows.append((*row, part.vector_a, part.vector_b, part.cosine, shown) if found else row)
    show.table((*columns, *vectors), rows)
    differing, total = len(comparison.differing), comparison.whole.tensors
    print(f"{differing} of {total} float tensors differ" if differing else "every float tensor is equal")


def _show_tasks(found: TaskVectors, talk: Talk) -> None:
    whole = found.whole
    rows: list[Sequence[object]] = []
    for i, task in enumerate(found.tasks):
        row = (task, whole.norms[i], show.percent(found.zeros[i]), *whole.cosines[i])
        rows.append(row)
    show.table(
        ("task vector", "norm", "zeros, %", *found.tasks), rows, title="Task vectors, and their cosines"
    )
    for warning in found.warnings:
        talk.say(f"warning: {warning}")
    if len(found.tasks) == 2:  # the table of distances says the rest
        return
    parts = [
        (name, n, f["cosine"], f["least"], f["largest"], f["conflicts"] and show.percent(f["conflicts"]))
        for name, n, f in summary_rows(found)
    ]
    columns = ("part", "tensors", "mean cosine", "least", "largest", "sign conflicts, %")
    show.table(columns, parts, title="Between tasks")


def verify(
    *,
    file: str = arg("FILE", "A file that clipmerge wrote."),
    talk: Talk,
    parents: list[str] | None = opt(None, "Look for the parents here too; repeat.", metavar="DIR"),
    device: str = DEVICE,
) -> None:
    """Recompute a merged file from its parents and compare every bit.

    The parents are found by their content, whatever they are called now. Exit code 0: verified; 1: a tensor
    differs, a parent is missing, or the file has no record.

    Example: [bold]clipmerge verify soup.safetensors --parents checkpoints/[/bold]
    """
    with talk.progress() as on_progress:
        verdict = verify_file(file, parents or [], device=device, on_progress=on_progress)
    if talk.json:
        missing = [{"name": p.name, "file": p.file, "digest": p.digest} for p in verdict.missing]
        facts = {name: getattr(verdict, name) for name in ("status", "reason", "notation", "tensor")}
        show.document({"file": file, **facts, "parents": dict(verdict.parents), "missing": missing})
        raise typer.Exit(int(verdict.status != "verified"))
    if verdict.status != "verified":
        raise CheckpointError(f"{file} is not verified: {verdict.reason}", hint=_hint(verdict))
    print(f"verified: {file}")
    for name, path in verdict.parents.items():
        talk.say(f"  {name} is {path}")
    talk.say(f"{verdict.notation}: {verdict.reason}")


def _hint(verdict: Verdict) -> str:
    if verdict.status == "missing":
        parents = (
            f"{p.name}: {p.file or 'was in memory'}, content digest {p.digest}" for p in verdict.missing
        )
        return "\n  ".join(["name the folders that hold them with --parents:", *parents])
    if verdict.status == "differs":
        return "the file or its record was changed after it was written; merge again"
    return "only files that clipmerge wrote, with digests, can be verified"


def report(
    *,
    folder: Path = arg("DIR", "Where results lie: JSON documents, merged files, commands.sh."),
    output: Path | None = opt(
        None, "The page; default: DIR/report.html.", OUTPUT, "--output", "-o", metavar="FILE"
    ),
    title: str | None = opt(None, "Its title; default: the folder's name.", OUTPUT),
    force: bool = FORCE,
    talk: Talk,
) -> None:
    """Write one HTML page of every result below a folder, which needs no network and no other file.

    It shows what commands print with --json, the records in merged files, and commands.sh: tables that sort, curves
    with their values, expressions and digests behind the rows.

        clipmerge soup ckpts/*.safetensors --greedy --val images/val \\
          -o runs/soup.safetensors --json > runs/soup.json
        clipmerge report runs/
    """
    page = report_page(folder, output, title=title, force=force, on_remark=talk.say)
    if talk.json:
        show.document({"kind": "report", "output": page})
        return
    talk.say(f"wrote {show.short(page)}")
