"""`clipmerge soup`: uniform, greedy and learned soups."""

from typing import TYPE_CHECKING, Any, Literal

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import CHECKPOINTS, INPUT, SEARCH, SEED
from clipmerge_cli.scoring import Choosing, run_search
from clipmerge_cli.writing import Output, refuse_mixture

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.search.results import SoupResult
    from clipmerge.types import Progress

_KIND = "Kind of soup"


def soup(
    *,
    checkpoints: list[str] = CHECKPOINTS,
    greedy: bool = opt(False, "Keep what helps on held-out images.", _KIND),
    learned: bool = opt(False, "Learn coefficients on held-out images.", _KIND),
    ensemble: bool = opt(False, "The greedy ensemble of logits, as a yardstick.", _KIND),
    val: str | None = opt(None, "Held-out images.", INPUT, metavar="DATA"),
    out: Output,
    choosing: Choosing,
    strict: bool = opt(False, "Keep only what raises the score.", SEARCH),
    order: Literal["score", "given", "random"] = opt("score", "Order in which candidates are tried.", SEARCH),
    per: Literal["model", "tower", "block", "tensor"] = opt(
        "model", "Learned: one share per model, or per part of it.", SEARCH
    ),
    epochs: int = opt(5, "Learned: passes over the images.", SEARCH, min=1),
    lr: float = opt(0.05, "Learned: AdamW's learning rate.", SEARCH),
    seed: int = SEED,
) -> None:
    """Average checkpoints into one: all of them (uniform), or those that help on held-out images.

    A greedy soup ranks the checkpoints on the held-out images and adds each in turn to the mean, keeping it
    if the score does not fall. Scores are remembered: a search that was stopped goes on where it was.

    \b
    clipmerge soup ckpts/*.safetensors -o soup.safetensors
    clipmerge soup ckpts/*.safetensors --greedy --val images/val \\
        --model ViT-B-32 -o soup.safetensors
    torchrun --nproc-per-node 8 -m clipmerge soup ckpts/*.safetensors \\
        --greedy --val images/val --device cuda --precision bf16 -o soup.safetensors
    """
    kinds = {"greedy": greedy, "learned": learned, "ensemble": ensemble}
    chosen = [name for name, wanted in kinds.items() if wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of --{' and --'.join(chosen)}", param_hint=f"--{chosen[1]}")
    kind = chosen[0] if chosen else "uniform"
    if kind != "uniform" and val is None:
        raise typer.BadParameter("a choice needs held-out images: --val DATA", param_hint="--val")
    if kind == "ensemble" and out.output is not None:
        raise typer.BadParameter("an ensemble is many models, not a file", param_hint="--output")
    out.check_usage(needed=kind == "uniform")

    from clipmerge.search.soup import greedy_soup, uniform_soup
    from clipmerge.weights.weights import load_all

    weights = load_all(checkpoints)
    refuse_mixture(weights)
    if out.dry_run or val is None:
        uniform = uniform_soup(weights)
        remark = f"uniform soup: the mean of {len(weights)} checkpoints"
        if kind != "uniform":
            remark = f"a {kind} soup chooses among these; the plan shows the mean of all of them"
        document = uniform.to_json() if out.json else None
        out.merge(uniform.weights, model=choosing.model, document=document, remark=remark)
        return

    def search(evaluator: "Evaluator", on_progress: "Progress | None") -> "SoupResult":
        from clipmerge.search.ensemble import greedy_ensemble
        from clipmerge.search.learned import learned_soup

        greedily: dict[str, Any] = {
            "order": order,
            "strict": strict,
            "seed": seed,
            "on_progress": on_progress,
        }
        if kind == "ensemble":
            return greedy_ensemble(weights, evaluator, **greedily)
        if kind == "learned":
            descent: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": choosing.batch_size}
            return learned_soup(weights, evaluator, per=per, seed=seed, on_progress=on_progress, **descent)
        if kind == "greedy":
            return greedy_soup(weights, evaluator, **greedily)
        return uniform_soup(weights, evaluator)

    run_search(search, {"val": val}, weights, choosing, out)
