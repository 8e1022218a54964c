import pytest
import torch

from dsv3.model.feed_forward import Experts, SwiGLU
from dsv3.ops.block_scaled import dequantize, quantize_blocks
from dsv3.ops.tiles import dequantize_rows, quantize_columns, quantize_rows
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.feed_forward import FeedForward


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x, power_of_two=False):
    return dequantize_rows(quantize_rows(x, power_of_two), torch.float32)


def seen_by_columns(x):
    return dequantize_rows(quantize_columns(x), torch.float32).t()


def blocks(weight):
    return dequantize(*quantize_blocks(weight), torch.float32)


def by_hand(x, gate_up, down, grad, power_of_two, fp8_weights, weight=1):
    """(output, gradients of x, gate_up and down, and of the rows' weights [R, 1]), every matrix rounded where the report says, products in FP32."""
    turned = seen_by_columns if fp8_weights else lambda each: each
    first, second = blocks(gate_up), blocks(down)
    inner = seen(x, power_of_two) @ first.t()
    gate, up = inner.chunk(2, -1)
    out = seen(weight * gate.sigmoid() * gate * up) @ second.t()
    grad_act = seen(grad, power_of_two) @ second
    gate, up = seen(inner).chunk(2, -1)
    s = gate.sigmoid()
    grad_weight = (grad_act * gate * s * up).sum(1)
    grad_act = grad_act * weight
    grad_inner = torch.cat((grad_act * up * s * (1 + gate * (1 - s)), grad_act * gate * s), -1)
    act = weight * gate * s * up
    grad_first = turned(grad_inner).t() @ turned(seen(x, power_of_two))
    return out, seen(grad_inner) @ first, grad_first, turned(grad).t() @ turned(act), grad_weight


def close(found, expected):
    # A value between two FP8 numbers may fall to either side, by the order of sums before it: few do, and by one step.
    assert (found - expected).norm() < 3e-3 * expected.norm()


def test_a_dense_layer_is_the_equations_on_quantised_matrices():
    layer = SwiGLU(160, 96)
    for number, each in enumerate(layer.parameters()):
        each.data.copy_(random(*each.shape, seed=number) / 12)
    layer.fp8 = FeedForward(WeightGradients())
    x, grad = random(200, 160, seed=5).requires_grad_(), random(200, 160, seed=6) * 1e-4
    out = layer(x)
    out.backward(grad)
    gate_up = torch.cat((layer.gate_proj.weight, layer.up_proj.weight)).detach()
    found = (
        out.detach(),
        x.grad,
        torch.cat((layer.gate_proj.weight.grad, layer.up_proj.weight.grad)),
        layer.down_proj.weight.grad,
    )
    expected = by_hand(x.detach(), gate_up, layer.down_proj.weight.detach(), grad, False, True)
    for each, wanted in zip(found, expected[:4], strict=True):
        close(each, wanted)


class Sizes:
    hidden_size, moe_intermediate_size = 160, 96


@pytest.mark.parametrize("behind", [0, 37])
def test_experts_are_the_equations_each_on_its_own_rows(behind):
    experts = Experts(Sizes, range(4))
    for number, each in enumerate(experts.parameters()):
        each.data.copy_(random(*each.shape, seed=number) / 12)
    experts.fp8 = FeedForward(WeightGradients(), power_of_two=True)
    counts = torch.tensor([70, 0, 129, 1])
    x, grad = random(200 + behind, 160, seed=5), random(200 + behind, 160, seed=6) * 1e-4
    x[200:] = grad[200:] = 0
    x.requires_grad_()
    weight = random(200 + behind, seed=7).abs().requires_grad_()
    out = experts(x, counts, weight)
    out.backward(grad)
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        found = (
            out.detach()[rows],
            x.grad[rows],
            experts.gate_up_proj.grad[e],
            experts.down_proj.grad[e],
            weight.grad[rows],
        )
        if not count:
            assert not found[2].any()
            assert not found[3].any()
            continue
        given = experts.gate_up_proj.detach()[e], experts.down_proj.detach()[e]
        expected = by_hand(x.detach()[rows], *given, grad[rows], True, False, weight.detach()[rows, None])
        for each, wanted in zip(found, expected, strict=True):
            close(each, wanted)
    assert not out[200:].any()


def test_inputs_and_what_swiglu_reads_are_kept_in_eight_bits_and_nothing_else():
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    layer = SwiGLU(256, 128)
    for each in layer.parameters():
        each.data.copy_(random(*each.shape) / 16)
    layer.fp8 = FeedForward(WeightGradients())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        layer(random(512, 256).bfloat16().requires_grad_())
    assert sum(kept) == 512 * (256 + 256) + 512 * (2 + 2) * 4
