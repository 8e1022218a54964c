import pytest
import torch
from torch import nn

from dsv3.ops.block_scaled import dequantize
from dsv3.ops.e5m6 import pack_e5m6, unpack_e5m6
from dsv3.ops.tiles import dequantize_rows, quantize_columns, quantize_rows
from dsv3.precision import scaling
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.projection import Projection


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(*outputs, inputs=160):
    made = [nn.Linear(inputs, size, bias=False) for size in outputs]
    for number, each in enumerate(made):
        each.weight.data.copy_(random(size := outputs[number], inputs, seed=number) / size**0.5)
    return made


def seen(x):
    """What is left of a matrix in tiles of 1 x 128."""
    return dequantize_rows(quantize_rows(x), torch.float64)


def seen_by_columns(x):
    """What is left of a matrix in tiles of 128 x 1."""
    return dequantize_rows(quantize_columns(x), torch.float64).t()


@pytest.mark.parametrize("twelve_bits", [False, True])
@pytest.mark.parametrize("rows", [1, 144, 300])
def test_all_three_products_are_those_of_quantised_matrices(rows, twelve_bits):
    linears = layers(128, 48)
    x = random(2, rows, 160, seed=5).requires_grad_()
    projection = Projection(linears, WeightGradients(), twelve_bits)
    out = projection(x)
    assert [each.shape for each in out] == [(2, rows, 128), (2, rows, 48)]
    grad = random(2, rows, 176, seed=6) * 1e-3
    torch.cat(out, dim=-1).backward(grad)

    flat, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
    weight = dequantize(*scaling.quantize_blocks(torch.cat([each.weight.detach() for each in linears])), torch.float64)
    kept = unpack_e5m6(pack_e5m6(flat)) if twelve_bits else dequantize_rows(quantize_rows(flat), torch.float32)
    flat_weight_grad = seen_by_columns(flat_grad).t() @ seen_by_columns(kept)
    # Sums in FP32.
    for found, expected in [
        (torch.cat(out, dim=-1).detach().flatten(0, 1), seen(flat) @ weight.t()),
        (x.grad.flatten(0, 1), seen(flat_grad) @ weight),
        (torch.cat([each.weight.grad for each in linears]), flat_weight_grad),
    ]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-5)


def test_weights_are_quantised_once_a_step(monkeypatch):
    made = []
    inner = scaling.quantize_blocks
    monkeypatch.setattr(scaling, "quantize_blocks", lambda *args: made.append(1) or inner(*args))
    linears = layers(32)
    projection = Projection(linears, WeightGradients())
    optimizer = torch.optim.SGD(linears[0].parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            projection(random(4, 160))[0].sum().backward()
        assert len(made) == step
        before = projection(random(4, 160))[0]
        optimizer.step()
        assert not torch.equal(projection(random(4, 160))[0], before)
    with torch.no_grad():
        linears[0].weight.copy_(random(32, 160, seed=9))
    projection(random(4, 160))
    linears[0].weight.data = random(32, 160, seed=10)
    projection(random(4, 160))
    assert len(made) == 6


@pytest.mark.parametrize(("twelve_bits", "bits"), [(False, 8), (True, 12)])
def test_the_input_is_kept_in_few_bits(twelve_bits, bits):
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    x = random(256, 1280).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        Projection(layers(16, inputs=1280), WeightGradients(), twelve_bits)(x)
    assert sum(kept) == 256 * 1280 * bits / 8 + 256 * 10 * 4


def test_nothing_is_kept_without_gradients():
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("kept"), lambda each: each):
        Projection(layers(16), WeightGradients())(random(3, 160))


def test_a_value_that_is_not_finite_reaches_its_row_and_no_other():
    x = random(4, 160)
    x[2, 150] = float("inf")
    (out,) = Projection(layers(16), WeightGradients())(x)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


def test_weight_gradients_can_wait():
    gradients, linears = WeightGradients(), layers(32, 16)
    projection = Projection(linears, gradients)
    x = random(2, 20, 160).requires_grad_()
    for _ in range(2):
        sum(each.square().sum() for each in projection(x)).backward()
    expected = [each.weight.grad for each in linears]
    expected_x, x.grad = x.grad, None
    for each in linears:
        each.weight.grad = None
    with gradients.deferred() as later:
        for _ in range(2):
            sum(each.square().sum() for each in projection(x)).backward()
    torch.testing.assert_close(x.grad, expected_x, rtol=0, atol=0)
    assert all(each.weight.grad is None for each in linears)
    first, second = later
    first()
    torch.testing.assert_close(linears[0].weight.grad * 2, expected[0])
    second()
    for each, grad in zip(linears, expected, strict=True):
        torch.testing.assert_close(each.weight.grad, grad, rtol=0, atol=0)


def test_copies_of_a_weight_stay_where_they_are():
    """Recorded passes read them there, those of the transposed weight too."""
    linears = layers(32)
    projection = Projection(linears, WeightGradients())
    x = random(4, 160).requires_grad_()
    projection(x)[0].sum().backward()
    blocks = projection.cache.blocks
    at = [each.data_ptr() for each in (blocks.values, blocks.scale, blocks.transposed.values, blocks.transposed.scale)]
    with torch.no_grad():
        linears[0].weight.copy_(random(32, 160, seed=9))
    projection.cache.refresh()
    expected = scaling.quantize_blocks(linears[0].weight.detach())
    blocks = projection.cache.blocks
    found = (blocks.values, blocks.scale, blocks.transposed.values, blocks.transposed.scale)
    assert [each.data_ptr() for each in found] == at
    assert torch.equal(found[0].float(), expected[0].float())
    assert torch.equal(found[2].float(), expected[0].float().t())
    assert torch.equal(found[3], expected[1].t())
