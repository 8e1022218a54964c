from tools import support


def test_the_matrix_in_the_documentation_is_the_validator_s():
    document = support.DOCUMENT.read_text(encoding="utf-8")
    assert support.BEGIN in document
    assert support.written(document) == document, "run python -m tools.support"


def test_it_says_what_is_refused_and_what_is_not():
    table = support.matrix()
    assert '| `training.balance = "batch"` | yes | yes | no (1) | no (1) | no (1) | no (1) |' in table
    assert "1. training.balance = 'batch' needs" in table
    assert '| `training.precision = "fp8"` | yes | yes | yes | yes | yes | yes |' in table
