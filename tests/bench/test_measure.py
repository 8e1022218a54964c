import sys
import time

from dsv3.bench.measure import Ratio, Result, Row, Spread, ratio, take_turns


def test_sides_take_turns_after_a_round_that_does_not_count():
    calls = []
    seen = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = take_turns(sides, 3, lambda **news: seen.append((news["done"], news["total"])))
    assert "".join(calls) == "baabbaab"  # every other round backwards
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_turns_are_timed():
    seconds = take_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 2)
    assert min(seconds["slow"]) >= 0.02 > max(seconds["fast"])


def test_what_prepares_a_turn_is_not_timed():
    prepared = []

    def prepare(name):
        prepared.append(name)
        time.sleep(0.05)

    seconds = take_turns({"a": lambda: None, "b": lambda: None}, 1, prepare=prepare)
    assert prepared == ["b", "a", "a", "b"]
    assert max(seconds["a"] + seconds["b"]) < 0.05


def test_a_ratio_is_taken_round_by_round_against_the_fastest():
    seconds = {"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "best": [3.0, 4.0, 20.0]}
    found = ratio("title", seconds, "ours", ["slow", "best"], 2.5)
    assert found == Ratio("title", "ours", "best", Spread(3.0, 2.0, 5.0), 2.5)  # 3, 2 and 5, not 4 / 2
    assert ratio("title", seconds, "ours", ["slow"], None).value.median == 4.5


def test_a_result_names_machine_versions_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/dsv3", "bench", "decode", "--json", "a b.json"])
    rows = [Row("dsv3 fp32", "batch 1", Spread(2.0, 1.0, 3.0), {"ms a step": 500.0})]
    ratios = [Ratio("title", "dsv3 fp32", "transformers", Spread(3.0, 2.0, 4.0), 3.0)]
    found = Result("decode", {"batch": 1}, rows, ratios, {"tokens": "all"})
    assert found.machine.keys() >= {"processor", "threads", "device"}
    assert found.versions.keys() == {"dsv3", "python", "torch", "transformers"}
    assert found.command == "dsv3 bench decode --json 'a b.json'"
