import time

import pytest

from dsv3.weights.jobs import Job, Journal, grouped, run_jobs


def jobs_of(count, ran, fails=None):
    """Jobs of one byte each; that of this number fails."""

    def make(number):
        def run(path, advance):
            ran.append(number)
            time.sleep(0.02)
            if number == fails:
                raise OSError(28, "No space left on device")
            path.write_text(str(number))
            advance(1)
            return number

        return Job(f"file{number}", 1, run)

    return [make(number) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_stops_the_rest_and_what_is_complete_is_kept(workers, tmp_path):
    ran, said = [], []
    with pytest.raises(OSError, match="No space left"):
        run_jobs(jobs_of(200, ran, fails=3), Journal(tmp_path / "out", "key"), workers, lambda *_: None)
    assert {0, 1, 2, 3} <= set(ran)
    assert len(ran) < 200
    again = []
    found = run_jobs(jobs_of(5, again), Journal(tmp_path / "out", "key"), workers, lambda *at: said.append(at))
    assert found == [0, 1, 2, 3, 4]
    assert 3 in again
    assert not {0, 1, 2} & set(again)
    assert (said[0], said[-1]) == ((0, 5), (5, 5))


def test_groups_hold_as_much_as_fits():
    assert grouped([("a", 3), ("b", 2), ("c", 9), ("d", 5), ("e", 1)], 5) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert grouped([], 5) == [[]]
