from dsv3.recipe.figures import duration, human, storage


def test_human():
    values = (0, 0.012, 3.14159, 9999, 1000.0, 12345, 1_904_640, 14.8e12)
    assert " ".join(map(human, values)) == "0 0.012 3.142 9999 1K 12.3K 1.9M 14.8T"


def test_duration():
    assert [duration(s) for s in (0.4, 89.0, 283.0, 5399.0, 10800.0)] == [
        "0 seconds", "89 seconds", "4.7 minutes", "90.0 minutes", "3.0 hours",
    ]  # fmt: skip


def test_storage():
    assert [storage(size) for size in (0, 4_411_148, 10**9, 163.4e9)] == ["0.00 MB", "4.41 MB", "1.00 GB", "163.40 GB"]
