import errno
import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dsv3.errors import RunError, UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dsv3.weights.huggingface import save_pretrained
from dsv3.weights.opening import load_model

CONFIG = ModelConfig.preset("debug", num_hidden_layers=2)


def some_tensors(fill):
    """Of all the kinds that a run keeps: nested, of several dtypes, scalar, empty."""
    return {
        "model": {"a.weight": torch.full((3, 4), float(fill)), "b.bias": torch.full((5,), float(fill)).bfloat16()},
        "optimizer": {"a.weight.step": torch.tensor(float(fill)), "part": {"state": torch.full((2,), fill, dtype=torch.uint8)}},
        "empty": {"rows": torch.zeros(0, 3)},
    }  # fmt: skip


def save(parent, step, fill=None):
    fill = step if fill is None else fill
    save_checkpoint(
        parent / f"step-{step}", some_tensors(fill), {"fill": fill}, {"tokenizer/vocab": str(fill).encode()}
    )


def check_whole(directory):
    """All parts of a checkpoint are there and belong together; returns what it was filled with."""
    into = some_tensors(99)
    fill = load_checkpoint(directory, into)["fill"]
    assert (directory / "tokenizer/vocab").read_bytes() == str(fill).encode()
    expected = some_tensors(fill)
    for part in ("model", "empty"):
        for name, tensor in expected[part].items():
            assert torch.equal(into[part][name], tensor)
    assert torch.equal(into["optimizer"]["part"]["state"], expected["optimizer"]["part"]["state"])
    assert into["optimizer"]["a.weight.step"] == fill
    return fill


def test_round_trip_is_bit_exact_and_in_place(tmp_path):
    model = DeepSeekV3(CONFIG).initialize(seed=1)
    for block in model.blocks():
        if block.moe:
            block.moe.gate.e_score_correction_bias.normal_()
    state = {"step": 7, "loss": 0.1 + 0.2, "nested": {"名": [1, None, True]}}
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    files = {"tokenizer": source, "deep/raw": b"\x00\xff"}
    directory = tmp_path / "run" / "step-00000007"
    save_checkpoint(directory, {"model": model.state_dict()}, state, files)

    other = DeepSeekV3(CONFIG).initialize(seed=2)
    assert load_checkpoint(directory, {"model": other.state_dict()}) == state
    for (name, expected), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    assert (directory / "tokenizer/tokenizer.json").read_text() == "{}"
    assert (directory / "deep/raw").read_bytes() == b"\x00\xff"
    assert (directory.parent / "latest").read_text().strip() == "step-00000007"
    assert {path.name for path in directory.parent.iterdir()} == {"latest", "step-00000007"}


def test_the_directory_holds_tensors_only_and_no_path_of_this_machine(tmp_path):
    save(tmp_path, 1)
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "step-1").read_metadata()
    kinds = {type(each).__name__ for each in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}  # no BYTE_IO item
    assert set(metadata.state_dict_metadata) == {
        "model.a.weight", "model.b.bias", "optimizer.a.weight.step", "optimizer.part.state", "empty.rows",
    }  # fmt: skip
    assert str(tmp_path).encode() not in (tmp_path / "step-1" / ".metadata").read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_loader_reads_it(tmp_path):
    save(tmp_path, 3)
    into = {"model.a.weight": torch.zeros(3, 4)}
    torch.distributed.checkpoint.load(into, checkpoint_id=tmp_path / "step-3")
    assert (into["model.a.weight"] == 3).all()


class Faults:
    """Counts every call that changes the disk while a checkpoint is saved, and acts at one of them."""

    def __init__(self):
        self.count, self.at, self.act = 0, None, None

    def step(self):
        self.count += 1
        if self.count == self.at:
            self.act()

    def arm(self, at, act):
        self.count, self.at, self.act = 0, at, act


@pytest.fixture
def faults(monkeypatch):
    faults = Faults()

    def counted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            faults.step()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("write_text", "write_bytes", "rename", "replace", "mkdir"):
        counted(Path, name)
    counted(os, "fsync")
    real_open = Path.open

    class Stream:
        def __init__(self, stream):
            self.stream, self.writes = stream, 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            self.writes += 1
            if self.writes % 16 == 1:  # torch writes in many small pieces
                faults.step()
            return self.stream.write(data)

    def opened(self, mode="r", *args, **kwargs):
        stream = real_open(self, mode, *args, **kwargs)
        return Stream(stream) if mode == "wb" else stream

    monkeypatch.setattr(Path, "open", opened)
    return faults


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True], ids=["new name", "same name"])
def test_a_full_disk_at_any_moment_leaves_whole_checkpoints_only(existing, tmp_path, faults):
    at, survivors = 0, set()
    while True:
        at += 1
        parent = tmp_path / str(at)
        save(parent, 1)
        faults.arm(at, disk_full)
        try:
            save(parent, 1 if existing else 2, fill=2)
        except RunError as error:
            assert "No space left on device" in str(error)  # noqa: PT017  # the loop ends at the first success
        else:
            break
        finally:
            faults.arm(None, None)
        survivors.add(check_whole(latest_checkpoint(parent)))
        for directory in parent.iterdir():
            if directory.is_dir():
                check_whole(directory)
        save(parent, 3)
        assert check_whole(latest_checkpoint(parent)) == 3
        assert not [path for path in parent.iterdir() if path.name.startswith(".")]
        shutil.rmtree(parent)
    assert at > 15  # every write, sync and rename had its turn
    assert survivors == {1, 2}
    assert check_whole(latest_checkpoint(parent)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot fork")
@pytest.mark.parametrize("existing", [False, True], ids=["new name", "same name"])
def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(existing, tmp_path, faults):
    survivors, at = [], 0
    while True:
        at += 1
        parent = tmp_path / str(at)
        save(parent, 1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                faults.arm(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save(parent, 1 if existing else 2, fill=2)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        survivors.append(check_whole(latest_checkpoint(parent)))
        for directory in parent.glob("[!.]*/"):
            check_whole(directory)
        save(parent, 3)
        assert check_whole(latest_checkpoint(parent)) == 3
        assert not [path for path in parent.iterdir() if path.name.startswith(".")]
        shutil.rmtree(parent)
    assert at > 15
    assert set(survivors) == {1, 2}
    assert survivors == sorted(survivors)  # once the new one is there, it stays


def test_an_error_of_the_system_itself_is_named(tmp_path):
    """A limit on the size of files stands for a disk that is really full."""
    tensors = {"model": {"large": torch.zeros(1_000_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"could not save .*File too large"):
            save_checkpoint(tmp_path / "step-1", tensors, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "step-1", some_tensors(1), {"bad": object()}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"could not save the checkpoint .*file/step-1"):
        save(tmp_path / "file", 1)


def test_latest_falls_back_to_the_newest_whole_one_with_a_warning(tmp_path, caplog):
    assert latest_checkpoint(tmp_path / "absent") is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path).name == "step-3"
    data = next((tmp_path / "step-3").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (tmp_path / "step-2" / ".metadata").unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "step-1"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert "step-3 is passed over" in warnings[0]
    assert "step-2 is passed over" in warnings[1]
    assert "step-1 is used instead of" in warnings[2]
    (tmp_path / "step-1" / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update({"a.weight": torch.zeros(4, 4)}), r"model\.a\.weight is torch\.float32 \[3, 4\], expected torch\.float32 \[4, 4\]"),
        (lambda t: t["model"].update({"a.weight": torch.zeros(3, 4).bfloat16()}), r"model\.a\.weight is torch\.float32 .* expected torch\.bfloat16"),
        (lambda t: t["model"].update({"a.wait": torch.zeros(1)}), r"has no tensor model\.a\.wait.*did you mean 'model\.a\.weight'"),
        (lambda t: t.pop("optimizer"), r"holds 2 tensors that this run has no place for"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_config_is_refused_and_nothing_is_loaded(change, message, tmp_path):
    save(tmp_path, 1)
    into = some_tensors(99)
    change(into)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "step-1", into)
    assert (into["model"]["b.bias"] == 99).all()


@pytest.mark.parametrize("damage", ["absent", "state.json", ".metadata", "__0_0.distcp"])
def test_incomplete_checkpoints_are_refused(damage, tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "step-1") if damage == "absent" else (tmp_path / "step-1" / damage).unlink()
    with pytest.raises(UserError, match=r"is no checkpoint|does not exist|is incomplete"):
        load_checkpoint(tmp_path / "step-1", some_tensors(0))


def test_damaged_data_is_refused(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-1" / "__0_0.distcp"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "step-1", some_tensors(0))


def saved_model(parent, **state):
    model = DeepSeekV3(CONFIG).initialize(seed=5)
    tensors = {"model": model.state_dict(), "optimizer": {"step": torch.zeros(())}}
    save_checkpoint(parent / "step-1", tensors, {"model": CONFIG.to_hf(), **state}, {"tokenizer/vocab": b""})
    return model


@pytest.mark.parametrize("asked", ["pretrain/checkpoints/step-1", "pretrain/checkpoints", "pretrain", "."])
def test_load_model_takes_a_checkpoint_or_a_run(asked, tmp_path):
    model = saved_model(tmp_path / "pretrain" / "checkpoints")
    loaded, tokenizer = load_model(tmp_path / asked)
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (tokenizer / "vocab").is_file()


def test_load_model_takes_a_hugging_face_directory(tmp_path):
    model = DeepSeekV3(CONFIG).initialize()
    save_pretrained(model, tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert tokenizer == tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16"])
def test_load_model_casts_all_but_the_routing_bias(dtype, tmp_path):
    model = saved_model(tmp_path)
    loaded, _ = load_model(tmp_path, dtype=dtype, device="auto")
    for name, tensor in loaded.state_dict().items():
        kept = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(tensor.cpu(), model.state_dict()[name].to(tensor.dtype))


def test_load_model_refuses_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="holds no model: expected a checkpoint"):
        load_model(tmp_path)
    saved_model(tmp_path)
    with pytest.raises(UserError, match=r"unknown dtype 'bf17': did you mean 'bf16'"):
        load_model(tmp_path, dtype="bf17")
    state = tmp_path / "step-1" / "state.json"
    state.write_text(json.dumps({"model": CONFIG.replace(vocab_size=321).to_hf()}))
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \[320, 32\], expected \[321, 32\]"):
        load_model(tmp_path)
    state.write_text(json.dumps({"model": CONFIG.replace(num_nextn_predict_layers=2).to_hf()}))
    with pytest.raises(UserError, match=r"lacks 42 of the 137 tensors .*model\.layers\.3\.enorm\.weight"):
        load_model(tmp_path)
    state.write_text("{}")
    with pytest.raises(UserError, match="has no model config"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "tokenizer/tokenizer.json", ".metadata", "sha256.json"])
@pytest.mark.parametrize("damage", ["a bit", "zeros", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, name, damage):
    for step in (1, 2):
        tensors = {"model": {"weight": torch.full((50, 40), float(step))}}
        save_checkpoint(tmp_path / f"step-{step}", tensors, {"step": step}, {"tokenizer/tokenizer.json": b"{}" * 50})
    path = tmp_path / "step-2" / name
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeros": bytes(len(content)),
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    found = latest_checkpoint(tmp_path, every_byte=True)
    if (name, damage) == ("sha256.json", "missing"):
        assert found == tmp_path / "step-2"  # as imported weights are, it is taken as it is
        return
    assert found == tmp_path / "step-1"
    assert "step-2 is passed over" in caplog.text
    assert "step-1 is used instead of" in caplog.text
