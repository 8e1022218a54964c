import pytest

from dsv3.errors import UserError
from dsv3.ops.operation import Implementation, Operation, anything


def make():
    """Doubles a number; the fast way takes even ones."""
    return Operation(
        "double",
        [
            Implementation(
                "shift", lambda x: ("shift", x << 1), lambda x: None if x % 2 == 0 else "takes even numbers"
            ),
            Implementation("reference", lambda x: ("reference", x + x), anything),
        ],
    )


def test_the_first_implementation_that_supports_the_call_serves():
    double = make()
    assert double(4) == ("shift", 8)
    assert double(x=4) == ("shift", 8)
    assert double(5) == ("reference", 10)
    assert double.explain(5) == [("shift", "takes even numbers"), ("reference", None)]


def test_the_environment_forces_one(monkeypatch):
    monkeypatch.setenv("DSV3_OPS", "other=fast,double=reference")
    assert make()(4) == ("reference", 8)
    monkeypatch.setenv("DSV3_OPS", "double=shift")
    assert make()(4) == ("shift", 8)
    monkeypatch.setenv("DSV3_OPS", "")
    assert make()(4) == ("shift", 8)


def test_a_forced_one_that_does_not_support_the_call_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setenv("DSV3_OPS", "double=shift")
    with pytest.raises(UserError, match=r"double: no implementation serves .* shift: takes even numbers"):
        make()(5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("double=shft", r"double has no implementation 'shft': did you mean 'shift'"),
        ("double", r"DSV3_OPS holds 'double': expected operation=implementation"),
        ("double=a=b", r"DSV3_OPS holds 'double=a=b'"),
    ],
)
def test_unknown_names_are_refused(value, message, monkeypatch):
    monkeypatch.setenv("DSV3_OPS", value)
    with pytest.raises(UserError, match=message):
        make()
