import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from clipmerge_cli.options import named, numbers


def test_named_data() -> None:
    assert named(["id=digits#val", "shift=x.npz"], "--eval") == {"id": "digits#val", "shift": "x.npz"}


def test_data_may_hold_an_equals_sign() -> None:
    assert named(["a=dir/x=y"], "--eval") == {"a": "dir/x=y"}


@pytest.mark.parametrize("value", ["digits", "=digits", "id=", "1d=digits", "a/b=c"])
def test_anything_else_is_wrong_usage(value: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not NAME=DATA"):
        named([value], "--eval")


def test_a_name_given_twice_is_wrong_usage() -> None:
    with pytest.raises(typer.BadParameter, match="'id' is given twice"):
        named(["id=a", "id=b"], "--eval")


def test_a_grid_is_exact() -> None:
    assert numbers("0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert numbers("0:0.9:0.4") == (0.0, 0.4, 0.8)
    assert numbers("0.5,0.25") == (0.5, 0.25)
    assert numbers("0.5") == (0.5,)


@given(st.integers(1, 200))
def test_a_grid_of_n_steps_has_both_ends(steps: int) -> None:
    grid = numbers(f"0:{steps * 0.05:.2f}:0.05")
    assert len(grid) == steps + 1
    assert grid[-1] == pytest.approx(steps * 0.05)


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:x", "0:1:0.1:2"])
def test_what_is_no_grid_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="neither START:STOP:STEP nor a list"):
        numbers(text)


@pytest.mark.parametrize(
    "text", ["0:1:0", "1:0:0.1", "0:1:-0.1", "0:Infinity:1", "0:NaN:1", "0:1:NaN", "nan"]
)
def test_a_grid_that_leads_nowhere_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        numbers(text)
