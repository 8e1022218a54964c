import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dsv3.recipe.quantity import Length, Quantity, format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("14.3T", 14_300_000_000_000),
        ("469B", 469_000_000_000),
        ("1.9M", 1_900_000),
        ("2K", 2000),
        ("7", 7),
        (7, 7),
        ("4.3T", 4_300_000_000_000),
        ("0.001K", 1),
    ],
)
def test_suffixes_are_powers_of_ten_and_exact(written: str | int, value: int) -> None:
    assert parse_quantity(written) == value


@pytest.mark.parametrize("written", ["", "T", "2k", "2 KB", "-3", "1e3", "1.5", "1.2345K", 1.5, True, None, [1], "٣"])
def test_refuses_what_is_no_count(written: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number"):
        parse_quantity(written)


@given(st.integers(min_value=1, max_value=10**18))
def test_formatting_loses_nothing(value: int) -> None:
    assert parse_quantity(format_quantity(value)) == value


def test_formatting_is_short() -> None:
    assert [format_quantity(n) for n in (14_300_000_000_000, 1_900_000, 2000, 1234567, 5)] == [
        "14.3T", "1.9M", "2K", "1234567", "5",
    ]  # fmt: skip


@pytest.mark.parametrize("written", ["4K", "4096", 4096.0, 0, -1, True])
def test_a_length_is_written_out(written: object) -> None:
    assert TypeAdapter(Length).validate_python(4096) == 4096
    with pytest.raises(ValidationError):
        TypeAdapter(Length).validate_python(written)


@pytest.mark.parametrize("written", [0, "0K", "-1"])
def test_a_quantity_is_above_zero(written: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Quantity).validate_python(written)
