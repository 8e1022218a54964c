"""Inputs and measures of the tests of FP8 products."""

import torch

from dsv3.ops.tiles import TILE, Tiles, empty_scale


def difference(found, expected):
    """1 - 2<x, y> / (<x, x> + <y, y>): DeepGEMM's measure, half the squared relative error where that is small."""
    x, y = found.double(), expected.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def wide_tiles(rows, columns, seed=0):
    """`Tiles` whose values are FP32: Triton's interpreter computes nothing else rightly."""
    generator = torch.Generator().manual_seed(seed)
    scale = empty_scale(rows, columns, torch.device("cpu"))
    scale.copy_(torch.rand(scale.shape, generator=generator) + 0.5)
    return Tiles(torch.randn(rows, columns, generator=generator), scale)


def wide_blocks(*shape, seed=1):
    """A weight and its scales, in FP32 likewise."""
    generator = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    scale = torch.rand(*stack, -(-rows // TILE), -(-columns // TILE), generator=generator) + 0.5
    return torch.randn(shape, generator=generator), scale
