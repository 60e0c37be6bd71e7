"""An option that has no effect beside the others is refused, with the reason, before anything is done."""

import pytest

from clipmerge_cli.app import main

SOUP = ["soup", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]
GREEDY = ["soup", "a.safetensors", "b.safetensors", "--greedy", "--val", "digits"]
PAIR = ["base.safetensors", "ft.safetensors", "-o", "out.safetensors"]
AUTO = ["--scale", "auto", "--val", "digits"]
PATCH = ["patch", *PAIR, "--patch", "digits#val", "--supported", "digits#test"]
UNSCORED = "without --val: a uniform soup is not scored"


@pytest.mark.parametrize(
    ("words", "option", "why"),
    [
        *((SOUP, option, UNSCORED) for option in ("--metric top5", "--limit 9", "--fresh", "--journal j.jsonl")),
        (SOUP, "--plot soup.png", UNSCORED),
        ([*SOUP, "--val", "digits"], "--plot soup.png", "without --greedy: there is one soup"),
        (SOUP, "--strict", "without --greedy"),
        (SOUP, "--order given", "without --greedy"),
        (SOUP, "--epochs 3", "without --learned"),
        (GREEDY, "--lr 0.1", "without --learned"),
        (GREEDY, "--per block", "without --learned"),
        (GREEDY, "--seed 1", "without --order random"),
        ([*GREEDY[:3], "--learned", "--val", "digits"], "--strict", "without --greedy"),
        *((GREEDY, option, "without -o") for option in ("--force", "--dtype fp16", "--no-digests", "--threads 2")),
        (["interpolate", *PAIR], "--plot curve.png", "without --eval"),
        (["interpolate", *PAIR], "--rule best-id", "without --eval"),
        (["interpolate", *PAIR, "--alpha", "0.3"], "--refine", "without --eval"),
        (["add", *PAIR], "--scales 0:1:0.5", "without --scale auto"),
        (["add", *PAIR], "--templates simple", "without --scale auto"),
        (["add", *PAIR, *AUTO], "--budget 9", "without --per task, tower or block"),
        (["negate", *PAIR], "--keep 0.9", "without --scale auto"),
        (["analogy", "base.safetensors", "--a", "a.safetensors", "--b", "b.safetensors", "--c", "c.safetensors",
          *SOUP[3:]], "--device cpu", "without --scale auto"),
        (PATCH, "--search random", "without --mode parallel"),
        ([*PATCH, "--mode", "parallel"], "--alphas 0:1:0.5", "with --mode parallel"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)  # fmt: skip
def test_it_is_refused_with_the_reason(
    words: list[str],
    option: str,
    why: str,
    tiny_checkpoints: dict[str, str],
    tmp_path: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {f"{name}.safetensors" for name in ("a", "b", "c", "base", "ft")}
    typed = [
        str(tiny_checkpoints["base"]) if w in files and words[words.index(w) - 1] != "-o" else w
        for w in words
    ]
    assert main([*typed, *option.split()]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"Invalid value for {option.split()[0]}: has no effect {why}" in shown


def test_the_same_option_is_taken_where_it_has_an_effect(
    tiny_checkpoints: dict[str, str], tiny_model_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(tiny_checkpoints[name]) for name in ("ft0", "ft1")]
    scoring = ["--val", "digits#val", "--model", str(tiny_model_file), "--limit", "40"]
    assert main(["soup", *pair, "--greedy", "--strict", "--order", "random", "--seed", "3", *scoring]) == 0
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        "nothing was written: the same command with -o FILE writes the model; the scores are remembered"
    )
