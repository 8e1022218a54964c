from importlib import metadata

from dsv3.stages.machine import versions


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    def version(name):
        if name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("dsv3.stages.machine.version", version)
    assert versions().keys() == {"dsv3", "python", "torch"}
