import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dsv3.errors import UserError
from dsv3.weights.checkpoint import save_checkpoint
from dsv3.weights.tensor_directory import ChunkReader


class RunsCommand:
    """What a malicious file holds: unpickling it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def metadata_of(directory):
    return dcp.FileSystemReader(directory).read_metadata()


def replace_metadata(directory, metadata):
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def directory(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path / "saved", tensors, {}, {})
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "wrap", [lambda evil, metadata: evil, lambda evil, metadata: setattr(metadata, "planner_data", evil) or metadata]
)
def test_code_in_the_metadata_is_refused_and_never_runs(wrap, directory):  # fmt: skip
    mark = directory / "it-ran"
    replace_metadata(directory, wrap(RunsCommand(f"touch {mark}"), metadata_of(directory)))
    with pytest.raises(UserError, match=r"\.metadata is damaged, or .* it names \w+\.system"):
        ChunkReader(directory)
    assert not mark.exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert mark.exists()  # it would have run


def test_an_entry_of_pickled_bytes_is_refused(directory):
    """DCP loads the content of such entries without any restriction."""
    metadata = metadata_of(directory)
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    replace_metadata(directory, metadata)
    with pytest.raises(UserError, match=r"it names .*BytesStorageMetadata"):
        ChunkReader(directory)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "sub/file"])
def test_files_outside_the_directory_are_refused(path, directory):
    metadata = metadata_of(directory)
    for place in metadata.storage_data.values():
        place.relative_path = path
    replace_metadata(directory, metadata)
    with pytest.raises(UserError, match="outside the checkpoint"):
        ChunkReader(directory)


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_damaged_metadata_is_refused(content, directory):
    (directory / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        ChunkReader(directory)


def test_truncated_metadata_is_refused_at_every_length(directory):
    content = (directory / ".metadata").read_bytes()
    for length in range(0, len(content), 7):
        (directory / ".metadata").write_bytes(content[:length])
        with pytest.raises(UserError, match="is damaged"):
            ChunkReader(directory)


def test_layout_and_tensors(directory):
    reader = ChunkReader(directory)
    assert reader.layout == {"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (4,))}
    into = torch.zeros(2, 3, dtype=torch.bfloat16)
    reader.fill({"a": into})
    assert torch.equal(into, torch.arange(6.0).view(2, 3).bfloat16())


def test_a_view_of_a_large_tensor_is_stored_alone(tmp_path):
    save_checkpoint(tmp_path / "saved", {"view": torch.zeros(1_000_000)[:10]}, {}, {})
    assert sum(file.stat().st_size for file in (tmp_path / "saved").iterdir()) < 100_000


def test_ctrl_c_while_writing_is_passed_on(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "saved", {"a": torch.zeros(1)}, {}, {})
