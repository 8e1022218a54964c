import math

import pytest
import torch
from torch import nn

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops import adamw
from dsv3.recipe.schema import OptimizerSection
from dsv3.training.optimizer import Muon, Optimizer, is_hidden_matrix, orthogonalise

KINDS = {
    "adamw": {"kind": "adamw"},
    "adamw with moments in bf16": {"kind": "adamw", "moments": "bf16"},
    "muon": {"kind": "muon"},
}


def small_model(seed=0):
    return DeepSeekV3(ModelConfig.preset("debug", num_hidden_layers=2)).initialize("fan_in", seed)


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 12), (2, 12, 40), (1, 1, 9)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[0])[:, None, None]  # fmt: skip
    result = orthogonalise(matrices, torch.float32)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.8
    assert values.max() < 1.2
    # The nearest semi-orthogonal matrix is U V^T: what comes out differs from it by its singular values alone.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    assert (inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))).abs().max() < 2e-2
    assert torch.diagonal(inner, dim1=1, dim2=2).min() > 0.8


def test_orthogonalise_treats_each_matrix_of_a_batch_alone():
    matrices = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([orthogonalise(each[None], torch.float32) for each in matrices])
    torch.testing.assert_close(orthogonalise(matrices, torch.float32), alone)
    assert orthogonalise(torch.zeros(1, 4, 4), torch.float32).isfinite().all()
    assert orthogonalise(matrices, torch.bfloat16).dtype == torch.bfloat16


def test_muon_equals_a_loop_over_matrices():
    """Nesterov momentum as an average, orthogonalised, scaled by 0.2 sqrt(max(out, in)); decoupled decay."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 4), (2, 4, 6), (6, 4)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    expected = [p.detach().clone() for p in ours]
    averages = [torch.zeros_like(p) for p in expected]
    muon = Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient
        muon.step()
        for weight, average, gradient in zip(expected, averages, gradients, strict=True):
            average.mul_(0.9).add_(0.1 * gradient)
            direction = 0.1 * gradient + 0.9 * average
            flat = direction.view(-1, *direction.shape[-2:])
            update = torch.stack([orthogonalise(m[None], torch.float32)[0] for m in flat]).view_as(weight)
            weight.copy_(weight - 0.1 * 0.5 * weight - 0.1 * 0.2 * math.sqrt(6) * update)
    for parameter, weight in zip(ours, expected, strict=True):
        torch.testing.assert_close(parameter.data, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", [2**26, 100])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(("decay_norms", "decay_embedding"), [(False, True), (True, True), (False, False)])
def test_adamw_equals_the_papers_loop_and_decay_spares_what_it_should(
    decay_norms, decay_embedding, moments, part, monkeypatch
):
    """Loshchilov & Hutter 2019, algorithm 2, with the schedule's rate in front of the decay as well; between two steps
    moments are what their dtype holds."""
    monkeypatch.setattr(adamw, "PART", part)
    model = small_model()
    section = OptimizerSection(
        kind="adamw",
        clip_norm=1e9,
        weight_decay=0.1,
        eps=1e-8,
        betas=(0.9, 0.95),
        decay_norms=decay_norms,
        decay_embedding=decay_embedding,
        moments=moments,
    )
    optimizer = Optimizer(model, section)
    weights = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}

    def kept(moment):
        return moment.float().bfloat16().double() if moments == "bf16" else moment

    for t, rate in ((1, 0.02), (2, 0.01), (3, 0.005)):
        fill_gradients(model, seed=t)
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        optimizer.clip()
        optimizer.step(rate)
        for name, weight in weights.items():
            g = gradients[name]
            first[name] = 0.9 * kept(first[name]) + 0.1 * g
            second[name] = 0.95 * kept(second[name]) + 0.05 * g * g
            corrected = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decays = decay_embedding if name == "embed_tokens.weight" else weight.dim() > 1 or decay_norms
            decay = 0.1 if decays else 0.0
            weights[name] = weight - rate * (corrected + decay * weight)
    for name, parameter in model.named_parameters():
        off = (parameter.double() - weights[name]).abs() > 2e-6 + 1e-5 * weights[name].abs()
        # A moment that lies between two numbers of BF16 may be rounded to the other one: one in thousands is.
        assert off.sum() <= (0 if moments == "fp32" else 1e-3 * off.numel() + 1), name
        assert parameter.grad is None


def test_muon_takes_the_matrices_of_all_blocks_and_of_the_mtp_modules_and_nothing_else():
    model = small_model()
    optimizer = Optimizer(model, OptimizerSection(kind="muon", muon_scale=0.5))
    words = {name.rpartition(".")[0] for name in optimizer.tensors() if name.endswith(".momentum")}
    assert "mtp.0.eh_proj.weight" in words
    assert "mtp.0.block.mlp.experts.down_proj" in words
    assert "layers.1.mlp.experts.gate_up_proj" in words
    for name, parameter in model.named_parameters():
        adam = (
            parameter.dim() == 1
            or name in ("embed_tokens.weight", "lm_head.weight")
            or name.endswith("mlp.gate.weight")
        )
        assert (name in words) == (not adam) == is_hidden_matrix(parameter, name)
    fill_gradients(model, 1)
    optimizer.step(0.01)
    assert [part.param_groups[0]["lr"] for part, _ in optimizer.parts] == [0.01, 0.005]


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_round_by_name_and_what_follows_is_the_same_bit_for_bit(kind):
    section = OptimizerSection(**KINDS[kind])
    model, other = small_model(), small_model(seed=1)
    optimizer, resumed = Optimizer(model, section), Optimizer(other, section)
    names = {name: tensor.dtype for name, tensor in resumed.tensors().items()}
    for seed in (1, 2):
        fill_gradients(model, seed)
        optimizer.step(0.01)
    assert {name: tensor.dtype for name, tensor in optimizer.tensors().items()} == names
    other.load_state_dict(model.state_dict())
    for name, tensor in resumed.tensors().items():
        tensor.copy_(optimizer.tensors()[name])
    for each, part in ((model, optimizer), (other, resumed)):
        fill_gradients(each, 3)
        part.step(0.01)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, a in optimizer.tensors().items():
        assert torch.equal(a, resumed.tensors()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_whole_whatever_had_a_gradient(kind):
    model = small_model()
    optimizer = Optimizer(model, OptimizerSection(**KINDS[kind]))
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = model.layers[0].mlp.down_proj.weight.detach().clone()
    optimizer.step(0.01)
    assert {name.rpartition(".")[0] for name in optimizer.tensors()} == {name for name, _ in model.named_parameters()}
    assert torch.equal(model.layers[0].mlp.down_proj.weight, before)  # no gradient, no step, no decay


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_clipping_is_by_the_norm_of_all_gradients_together(kind, scale):
    models = small_model(), small_model()
    clipped, shortened = (Optimizer(each, OptimizerSection(clip_norm=1.5, **KINDS[kind])) for each in models)
    for model in models:
        fill_gradients(model, 1, scale)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in models[0].parameters()))
    assert float(clipped.clip()["all"]) == pytest.approx(norm, rel=1e-5)
    for parameter in models[1].parameters():
        parameter.grad *= min(1.0, 1.5 / norm)
    clipped.step(0.01)
    shortened.step(0.01)
    for name, each in shortened.tensors().items():
        torch.testing.assert_close(
            clipped.tensors()[name], each, rtol=1e-2 if each.dtype == torch.bfloat16 else 1e-4, atol=0
        )
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_norms_are_told_apart_by_module():
    model = small_model()
    optimizer = Optimizer(model, OptimizerSection(clip_norm=1e9))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    expected = dict.fromkeys(
        ["embedding", "head", "attention", "router", "experts", "shared", "dense", "norms", "mtp"], 0.0
    )
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith("mtp."):
            group = "mtp"
        elif name.endswith("norm.weight"):
            group = "norms"
        elif "self_attn" in name:
            group = "attention"
        elif "shared_experts" in name:
            group = "shared"
        elif "experts" in name:
            group = "experts"
        elif name.endswith("gate.weight"):
            group = "router"
        else:
            group = {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "dense")
        expected[group] += parameter.numel() * (number + 1.0) ** 2
    norms = optimizer.clip()
    assert norms.keys() == {*expected, "all"}
    for group, squares in expected.items():
        assert float(norms[group]) == pytest.approx(squares**0.5, rel=1e-5), group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_weights_and_moments_to_the_bit(kind, bad):
    model = small_model()
    optimizer = Optimizer(model, OptimizerSection(**KINDS[kind]))
    fill_gradients(model, 1)
    optimizer.clip()
    optimizer.step(0.01, torch.tensor(False))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: each.clone() for name, each in optimizer.tensors().items()}
    fill_gradients(model, 2)
    model.lm_head.weight.grad[3, 2] = bad
    norms = optimizer.clip()
    assert not norms["all"].isfinite()
    optimizer.step(0.01, ~norms["all"].isfinite())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(each, state[name]) for name, each in optimizer.tensors().items())
    fill_gradients(model, 3)
    optimizer.step(0.01, torch.tensor(False))
    assert not any(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_that_may_be_skipped_and_is_not_is_the_step_itself():
    for kind in KINDS:
        model, other = small_model(), small_model()
        for each, skip in ((model, None), (other, torch.tensor(False))):
            optimizer = Optimizer(each, OptimizerSection(**KINDS[kind]))
            for seed in (1, 2):
                fill_gradients(each, seed)
                optimizer.step(0.01, skip)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_shows_in_the_versions_of_the_weights(kind):
    model = small_model()
    optimizer = Optimizer(model, OptimizerSection(**KINDS[kind]))
    for _ in range(2):
        before = {name: each._version for name, each in model.named_parameters()}
        fill_gradients(model, 0)
        optimizer.step(1e-3)
        assert all(each._version > before[name] for name, each in model.named_parameters())
