"""A device that is not here ends every command that takes a model in one paragraph."""

import pytest

import dsv3
from dsv3.cli import main
from dsv3.errors import UserError
from dsv3.weights.opening import load_model


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
@pytest.mark.parametrize(
    ("command", "options"), [("generate", ["--prompt", "x"]), ("chat", []), ("eval", ["--tasks", "needle"])]
)
def test_a_wrong_device_is_refused(checkpoint, capsys, command, options, device):
    assert main.run([command, str(checkpoint), *options, "--device", device]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"dsv3: device '{device}': ")
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("open_model", [dsv3.LLM, load_model])
def test_from_python(checkpoint, open_model):
    with pytest.raises(UserError, match="device 'foo': expected 'auto', 'cpu', 'cuda'"):
        open_model(checkpoint, device="foo")
