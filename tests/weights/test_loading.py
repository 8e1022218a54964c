import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.errors import UserError
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.convert import export_weights, import_weights, plan_import
from dsv3.weights.huggingface import from_pretrained, open_directory, save_pretrained
from dsv3.weights.loading import fill
from dsv3.weights.opening import load_model, open_weights
from dsv3.weights.released import Converted
from dsv3.weights.safetensors_writer import write_shards
from tests.weights.test_convert import assert_same_files, random_model

E4M3 = torch.float8_e4m3fn


@pytest.fixture
def directory(tmp_path):
    """In FP8, with MTP, in one file."""
    save_pretrained(random_model(), tmp_path / "fp32")
    export_weights(tmp_path / "fp32", tmp_path / "fp8", E4M3)
    return tmp_path / "fp8"


def change(directory, edit):
    """Edits the dict of all tensors."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


class Counting:
    """A released model that notes what is read."""

    def __init__(self, source):
        self.source, self.names = source, []
        self.where, self.config, self.layout = source.where, source.config, source.layout

    def read(self, name):
        self.names.append(name)
        return self.source.read(name)


@pytest.mark.parametrize("form", ["files", "checkpoint"])
def test_a_rank_reads_its_layers_and_experts_and_nothing_else(form, tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path / "hf", max_shard_bytes=50_000)
    path = tmp_path / "hf"
    if form == "checkpoint":
        path = tmp_path / "checkpoint"
        import_weights(plan_import(tmp_path / "hf"), path)
    source = Counting(open_weights(path)[0])
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("layers.2.")}
    experts = range(2, 5)
    tensors = {name: torch.empty_like(each[2:5] if each.dim() == 3 else each) for name, each in state.items()}
    fill(tensors, source, model.config, experts)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name][2:5] if tensor.dim() == 3 else state[name]), name
    assert len(source.names) == len(set(source.names))
    assert all(name.startswith("model.layers.2.") for name in source.names)
    assert {name.split(".experts.")[1].split(".")[0] for name in source.names if ".experts." in name} == {"2", "3", "4"}
    assert sum(source.layout[name].bytes for name in source.names) == sum(each.nbytes for each in tensors.values())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), r"lacks 1 of .*mlp\.up_proj\.weight_scale_inv"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 1)}), r"model\.safetensors: tensor .*up_proj\.weight_scale_inv has shape \[2, 1\].*\[1, 1\]"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1).bfloat16()}), r"up_proj\.weight_scale_inv is BF16, expected F32 or F8_E8M0"),
        (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}), r"unexpected tensor lm_head\.weight_scale_inv"),
        (lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(32, 64).to(E4M3), "model.layers.3.eh_proj.weight_scale_inv": torch.ones(1, 1)}), r"stores mtp\.0\.eh_proj\.weight in FP8, which is kept only in"),
    ],
)  # fmt: skip
def test_fp8_that_cannot_be_kept_is_refused(edit, message, directory):
    change(directory, edit)
    with pytest.raises(UserError, match=message):
        from_pretrained(directory)


def in_bf16(tensors, name):
    tensors[name] = torch.zeros(tensors[name].shape).bfloat16()
    del tensors[name + "_scale_inv"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["up_proj"], r"experts\.1\.up_proj\.weight is BF16, but .*experts\.0\.gate_proj\.weight is F8_E4M3"),
        (["down_proj"], r"experts\.1\.down_proj\.weight is BF16, but .*experts\.0\.down_proj\.weight is F8_E4M3"),
    ],
)
def test_experts_of_two_dtypes_need_one_named(names, message, directory):
    """Kept as they are they are refused; dequantised they are read."""
    change(directory, lambda t: [in_bf16(t, f"model.layers.1.mlp.experts.1.{name}.weight") for name in names])
    with pytest.raises(UserError, match=message):
        from_pretrained(directory)
    model = from_pretrained(directory, torch.float32)
    experts = model.layers[1].mlp.experts
    zeros = experts.down_proj[1] if names == ["down_proj"] else experts.gate_up_proj[1, 16:]
    assert not zeros.any()
    assert experts.down_proj[0].any()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quant_method = 'awq', expected 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": None}, r"weight_block_size = None, expected \[128, 128\]"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, r"fmt = 'e5m2', expected 'e4m3'"),
        ("fp8", "quantization_config = 'fp8', expected an object"),
    ],
)
def test_other_quantisations_are_refused(quantization, message, directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UserError, match=message):
        from_pretrained(directory)


def test_links_out_of_the_directory_are_refused_but_for_a_hubs_cache(directory, tmp_path):
    file = directory / "model.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere\.safetensors, outside its directory"):
        open_directory(directory)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    outside.rename(blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").write_text((directory / "config.json").read_text())
    assert from_pretrained(snapshot, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_on_the_cpu_fp8_becomes_bf16_with_one_line(directory, caplog):
    model, tokenizer = load_model(directory, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer == directory
    assert [record.message.partition(" is in ")[2] for record in caplog.records] == [
        "FP8, which CPUs do not compute in: its weights become BF16"
    ]
    wide, _ = load_model(directory, dtype="fp32", device="cpu")
    expected = from_pretrained(directory, torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in wide.state_dict().items())


def test_fp8_weights_are_not_trained(directory):
    model = from_pretrained(directory)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "layers.0.self_attn.o_proj.weight" not in trained
    assert {"embed_tokens.weight", "layers.1.mlp.gate.weight", "mtp.0.eh_proj.weight"} <= trained
    assert isinstance(model, DeepSeekV3)


def test_scales_in_eight_bits_are_read_and_come_back(tmp_path):
    """V3.1's scales are powers of two; some tools store them as E8M0, which holds nothing else."""
    save_pretrained(random_model(), tmp_path / "fp32")
    source = open_weights(tmp_path / "fp32")[0]
    write_shards(tmp_path / "fp8", Converted(source, E4M3, power_of_two=True), {}, 10**9)
    (tmp_path / "fp8" / "config.json").write_text((tmp_path / "fp32" / "config.json").read_text())
    expected = from_pretrained(tmp_path / "fp8", torch.float32).state_dict()

    def narrow(tensors):
        tensors.update(
            {name: each.to(torch.float8_e8m0fnu) for name, each in tensors.items() if name.endswith("_scale_inv")}
        )

    change(tmp_path / "fp8", narrow)
    found = from_pretrained(tmp_path / "fp8", torch.float32).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    kept = from_pretrained(tmp_path / "fp8")
    assert kept.layers[1].mlp.experts.gate_up_proj_scale_inv.dtype == torch.float8_e8m0fnu
    import_weights(plan_import(tmp_path / "fp8"), tmp_path / "checkpoint")
    export_weights(tmp_path / "checkpoint", tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "fp8", configs=False)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_pretrained(random_model(), tmp_path, max_shard_bytes=50_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} is in .*00001.* and in .*00002"):
        from_pretrained(tmp_path)
