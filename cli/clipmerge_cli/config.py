"""`--config`: options of `finetune` from TOML, from what `inspect --json` prints, or from a finetuned checkpoint."""

import json
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer

from clipmerge.errors import TrainingError
from clipmerge.text import did_you_mean
from clipmerge_cli.groups import opt

_FACTS = ("base", "images", "sets", "step", "scores")
"""What a record of training holds beside hyperparameters."""

_HIDDEN = ("contexts", "channels_last")
"""Hyperparameters that no option has."""

_hidden: ContextVar[Mapping[str, Any]] = ContextVar("hidden", default={})  # noqa: B039 - never changed in place


def config_option() -> Any:
    """Declare --config, which is read before the options that it gives."""
    text = "Options from a TOML file, or those that a finetuned checkpoint records; typed ones win."
    return opt(None, text, "Method", metavar="FILE", callback=_apply, is_eager=True)


def hidden_settings() -> dict[str, Any]:
    """Return the hyperparameters of --config that no option has."""
    return dict(_hidden.get())


def _apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options.

    Raises:
        TrainingError: it cannot be read, or holds something that is no option.
    """
    _hidden.set({})
    if path is None:
        return None
    values = {name.replace("-", "_"): value for name, value in _read(path).items() if value is not None}
    if isinstance(values.get("base"), list):  # a record's: which file it was, not where it lies now
        del values["base"]
    frozen = values.pop("frozen_head", False)
    values = {name: value for name, value in values.items() if name == "base" or name not in _FACTS}
    if frozen:
        values.setdefault("head", "frozen")
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    for name in values.keys() - known - {*_HIDDEN}:
        hint = did_you_mean(name, known, "`clipmerge finetune --help` lists the options")
        raise TrainingError(f"{path}: {name} is no option of finetune", hint=hint)
    _hidden.set({name: values.pop(name) for name in _HIDDEN if name in values})
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = json.dumps(values["augment"])
    if isinstance(values.get("shares"), Mapping):
        values["shares"] = ",".join(f"{name}={share}" for name, share in values["shares"].items())
    for name in ("train", "val", "templates", "classnames"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _read(path: Path) -> dict[str, Any]:
    """Return what the file says: TOML's keys, or a record of training."""
    hint = "a TOML file with options as keys, the output of `clipmerge inspect FILE --json`, or a finetuned checkpoint"
    if path.suffix not in (".toml", ".json"):
        from clipmerge.weights.weights import load

        document: Any = {"record": load(path).record}
    else:
        try:
            text = path.read_text(encoding="utf-8")
            document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise TrainingError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
        except ValueError as error:
            raise TrainingError(f"{path} is not {path.suffix[1:].upper()}: {error}", hint=hint) from error
    record = document.get("record", document) if isinstance(document, Mapping) else None
    training = record.get("training", record) if isinstance(record, Mapping) else None
    if not isinstance(training, Mapping) or "notation" in training or not training:
        raise TrainingError(f"{path} records no finetuning", hint=hint)
    return dict(training)
