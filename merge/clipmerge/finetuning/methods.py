"""Apply a method to a model: its head, what trains and what stays frozen, and its objective."""

from collections.abc import Sequence
from copy import deepcopy

from torch.nn import functional as F

from clipmerge.data.prompts import CONTEXTS, context_templates
from clipmerge.distributed import world
from clipmerge.finetuning.batches import Prompts, Tokenizer, training_prompts
from clipmerge.finetuning.head import attach_head, initial_head, read_head
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.objective import BaseContexts, Classification, Contrastive, Objective
from clipmerge.finetuning.parallel import wrap
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, freeze, set_modes
from clipmerge.weights.weights import Weights

__all__ = ["apply_method", "base_contexts", "classification", "contrastive"]


def apply_method(
    towers: Towers,
    tokenizer: Tokenizer,
    prompts: Prompts,
    images: Images,
    settings: Settings,
    head: Weights | None = None,
) -> Objective:
    """Return the objective over the towers, wrapped for this world; what does not train is frozen and computed once.

    Args:
        head: the checkpoint whose head is taken instead of the method's own start.
    """
    row = settings.row
    objective: Contrastive | Classification
    if row.head is None:
        objective = contrastive(towers, prompts, images, settings)
        image, text, scale = objective.trains_image, objective.trains_text, settings.logit_scale != "frozen"
    else:
        objective = classification(towers, tokenizer, images, settings)
        image, text, scale = True, False, False
    if head is not None:
        attach_head(towers.model, *read_head(head, prompts.classes))
    elif row.head is not None:
        attach_head(towers.model, *initial_head(row.head, towers, prompts, images))
    freeze(towers.model, image=image, text=text, scale=scale)
    set_modes(towers.model, image=image, text=text)
    if settings.checkpointing:
        towers.model.set_grad_checkpointing(True)  # type: ignore[operator]
    objective.module = wrap(
        towers,
        sharded=settings.fsdp,
        synced=world() > 1 and not settings.fsdp and settings.chunk is None,
        compiled=settings.compile,
    )
    return objective


def contrastive(towers: Towers, prompts: Prompts, images: Images, settings: Settings) -> Contrastive:
    """Return the contrastive objective; features of a frozen tower are looked up where nothing in them is random."""
    image, text = settings.towers != "text", settings.towers != "image"
    fixed = not image and not images.random
    return Contrastive(
        towers,
        towers,
        prompts,
        trains_image=image,
        trains_text=text,
        image_table=images.features(towers, images.plain()) if fixed else None,
        text_table=None if text else towers.prompt_features(prompts.tokens),
        label_smoothing=settings.label_smoothing,
        multi_positive=settings.multi_positive,
        chunk=settings.chunk,
        multiple=64 if settings.compile else 1,
    )


def classification(
    towers: Towers, tokenizer: Tokenizer, images: Images, settings: Settings
) -> Classification:
    """Return cross-entropy over a head, for CAR-FT with the term that keeps the base's contexts."""
    base = None
    if settings.row.contexts:
        base = base_contexts(towers, tokenizer, images, settings.contexts, settings.car_weight)
        if not images.random and not settings.mixup:
            base.table = images.features(base.towers, images.plain())
    return Classification(towers, towers, settings.seed, settings.label_smoothing, settings.mixup, base)


def base_contexts(
    towers: Towers, tokenizer: Tokenizer, images: Images, contexts: Sequence[str] | None, weight: float
) -> BaseContexts:
    """Return CAR-FT's frozen side: the base's image tower, and a vector for each context.

    A context's vector is the mean over classes of its unit prompt features, made a unit vector again.
    Source: Mao et al. 2022, arXiv 2211.16175.
    """
    templates = context_templates(contexts or CONTEXTS)
    prompts = training_prompts(towers.model, tokenizer, images.train, templates, images.device)
    features = towers.prompt_features(prompts.tokens)
    by_class = features.view(prompts.classes, -1, features.shape[1])
    frozen = deepcopy(towers).eval().requires_grad_(False)
    scale = float(towers.exp_scale.detach())
    return BaseContexts(F.normalize(by_class.mean(dim=0), dim=-1), scale, frozen, weight)
