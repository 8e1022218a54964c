from dsv3.recipe.differences import differences


def test_equal_values_have_none():
    assert differences({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []


def test_dotted_keys_with_both_values():
    old = {"a": {"b": 1, "c": [{"d": "x"}, {"d": "y"}]}, "gone": 3, "list": [1]}
    new = {"a": {"b": 2, "c": [{"d": "x"}, {"d": "z"}]}, "came": 4, "list": [1, 2]}
    assert differences(old, new) == [
        "a.b was 1 and is 2",
        "a.c.1.d was 'y' and is 'z'",
        "came was None and is 4",
        "gone was 3 and is None",
        "list was [1] and is [1, 2]",
    ]


def test_a_section_in_place_of_a_value_and_the_reverse():
    assert differences({"a": 0.5}, {"a": {"b": 1}}) == ["a was 0.5 and is {'b': 1}"]
    assert differences({"a": [{"b": 1}]}, {"a": 0.5}) == ["a was [{'b': 1}] and is 0.5"]
