import pytest
import torch

from dsv3.errors import RunError
from dsv3.precision import products
from dsv3.training.not_finite import NotFinite, first_not_finite

FP8_SIZES = [f"model.{key}=16" for key in ("q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")]


def find(trainer):
    found = first_not_finite(trainer.model, lambda: trainer.gradients(trainer.loader.batch(0, 4), 0.3)[0])
    assert all(each.grad is None for each in trainer.model.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in trainer.model.modules())
    return found


def test_nothing_is_found_where_all_is_finite(tmp_path, make_trainer, monkeypatch):
    assert find(make_trainer(tmp_path)) is None
    monkeypatch.setattr(products, "FP8_WEIGHT_GRADIENT_ROWS", 1)  # experts' rows are padded, and have some behind them
    assert find(make_trainer(tmp_path, "training.precision=fp8", *FP8_SIZES)) is None


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight", "layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.gate.e_score_correction_bias",
        "mtp.0.block.self_attn.o_proj.weight",
    ],
)  # fmt: skip
def test_a_weight_is_named(tmp_path, make_trainer, name):
    trainer = make_trainer(tmp_path)
    weight = trainer.model.state_dict()[name]
    weight.view(-1)[-1] = float("nan")
    assert find(trainer) == NotFinite(name)


@pytest.mark.parametrize("kind", ["fp32", "fp8", "recomputed"])
@pytest.mark.parametrize("block", ["layers.0", "layers.2", "mtp.0.block"])
@pytest.mark.parametrize(
    "part", ["input_layernorm", "self_attn.kv_a_layernorm", "self_attn.o_proj", "post_attention_layernorm"]
)
def test_an_activation_is_named_with_its_place(tmp_path, make_trainer, kind, block, part):
    """And not what it spoils later: the rest of its block, the blocks behind, all gradients."""
    overrides = {
        "fp32": [], "fp8": ["training.precision=fp8", *FP8_SIZES],
        "recomputed": ['training.recompute=["norms", "mla_up", "swiglu"]'],
    }  # fmt: skip
    trainer = make_trainer(tmp_path, "training.micro_batch_size=2", *overrides[kind])
    calls = []

    def spoil(module, inputs, output):
        calls.append(module)
        if len(calls) == 2:
            output = output.clone()
            output[1, 5, 0] = float("inf")
        return output

    trainer.model.get_submodule(f"{block}.{part}").register_forward_hook(spoil)
    found = first_not_finite(trainer.model, lambda: trainer.gradients(trainer.loader.batch(0, 4), 0.3)[0])
    assert found == NotFinite(f"the output of {block}.{part}", 1, (1, 5))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["layers.1.mlp.experts.gate_up_proj"], "the output of layers.1.mlp.experts"),
        (
            ["layers.2.mlp.shared_experts.gate_proj.weight", "layers.2.mlp.shared_experts.up_proj.weight"],
            "the output of layers.2.mlp.shared_experts",
        ),
        (["mtp.0.block.mlp.experts.gate_up_proj"], "the output of mtp.0.block.mlp.experts"),
        (["mtp.0.eh_proj.weight"], "the output of mtp.0.eh_proj"),
        (["lm_head.weight"], "the loss"),
    ],
)
def test_a_product_that_overflows_is_named(tmp_path, make_trainer, precision, weights, expected):
    trainer = make_trainer(tmp_path, f"training.precision={precision}", *FP8_SIZES)
    for name in weights:
        weight = trainer.model.state_dict()[name]
        weight.copy_(weight.sign() * 3e38)
    assert find(trainer).what.removesuffix(".down_proj") == expected


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("block", ["layers.1", "mtp.0.block"])
def test_the_gradient_that_was_wrong_first_is_named(tmp_path, make_trainer, precision, block):
    trainer = make_trainer(tmp_path, f"training.precision={precision}", *FP8_SIZES)

    def spoil(module, inputs, output):
        output.register_hook(lambda grad: grad * float("inf"))

    trainer.model.get_submodule(f"{block}.self_attn.kv_a_layernorm").register_forward_hook(spoil)
    found = first_not_finite(trainer.model, lambda: trainer.gradients(trainer.loader.batch(0, 4), 0.3)[0])
    assert found == NotFinite(f"the gradient of the output of {block}.self_attn.kv_a_layernorm", 0, (0, 0))


def test_a_weights_gradient_is_named(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    trainer.model.mtp[0].block.moe.gate.weight.register_hook(lambda grad: grad * float("nan"))
    assert find(trainer) == NotFinite("the gradient of mtp.0.block.mlp.gate.weight")


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("balance", ["bias", "batch"])
def test_a_run_that_ends_says_tensor_row_position_and_document(tmp_path, make_trainer, caplog, micro, balance):
    trainer = make_trainer(
        tmp_path, "training.max_skipped_steps=0", f"training.micro_batch_size={micro}", f"training.balance={balance}",
        "training.balance_alpha=1e-4",
    )  # fmt: skip
    batch = trainer.loader.rows(4, 4)  # of the second step
    tokens = batch.tokens[3, :-1].clone()
    segment = int(batch.segment_ids[3, 7])

    def spoil(module, inputs, output):
        """Where that row is looked up; MTP looks it up as well, shifted."""
        output = output.clone()
        for row, read in enumerate(inputs[0]):
            if torch.equal(read, tokens):
                output[row, 7] = float("nan")
        return output

    trainer.model.embed_tokens.register_forward_hook(spoil)
    with pytest.raises(RunError) as caught:
        trainer.run()
    document = trainer.loader.shards[0].name(batch.documents[3][segment][1])
    place = f"The first that is not is the output of embed_tokens, from position 7 of row 7 on (counts:{document})."
    assert f"the loss of step 2 is not finite. {place} Its batch holds rows 4 to 7" in str(caught.value)
    assert caplog.text.count(place) == 1


def test_what_later_weights_no_longer_show_is_said(tmp_path, make_trainer, caplog):
    """A GPU's figures are read when the next step is under way."""
    trainer = make_trainer(tmp_path)
    calls = []

    def spoil(module, inputs, output):
        calls.append(module)
        return output * float("nan") if len(calls) == 1 else output

    trainer.model.norm.register_forward_hook(spoil)
    trainer.run()
    assert "step 1 was skipped" in caplog.text
    assert "Computed again with the weights of now, all of it is finite. Its batch holds rows 0 to 3" in caplog.text
