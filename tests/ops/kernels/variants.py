"""Compiles every kernel for sm_90 as it is launched, which needs no GPU. A program of its own: test sessions interpret kernels.

python -m tests.ops.kernels.variants
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SHARED_MEMORY = 232_448
"""Bytes that one block may take on sm_90."""


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments (Triton's: "*bf16", "*fp8e4nv", "*fp32", "i32", ...) and its constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """num_warps, num_stages, maxnreg."""
    contains: str = ""
    """What its PTX must hold, such as "wgmma"."""


def variants() -> Iterator[Variant]:
    """All of them, one generator an operation."""
    yield from of_tiles()
    yield from of_blocks()
    yield from of_rms_norm()
    yield from of_swiglu()


def i32(names: str) -> dict[str, str]:
    """Types of integers, named in one string."""
    return dict.fromkeys(names.split(), "i32")


def of_tiles() -> Iterator[Variant]:
    """Quantisation along rows, columns, both, and back."""
    from dsv3.ops.kernels import tiles

    rows, warps = tiles.ROWS
    columns, transposing_warps = tiles.TRANSPOSING
    sizes, e4m3, scale = i32("rows columns"), "*fp8e4nv", "*fp32"
    for x in ("*bf16", "*fp32"):
        for power_of_two in (False, True):
            yield Variant(
                tiles.rows_kernel,
                {"x": x, "values": e4m3, "scale": scale} | sizes | i32("x_stride scale_stride"),
                {"POWER_OF_TWO": power_of_two, "ROWS": rows, "TILE": 128},
                {"num_warps": warps},
                "satfinite.e4m3x2.f32",
            )
        yield Variant(
            tiles.dequantize_kernel,
            {"values": e4m3, "scale": scale, "out": x} | sizes | i32("values_stride scale_row_stride scale_stride"),
            {"ROWS": rows, "TILE": 128},
            {"num_warps": warps},
        )
    strides = i32("x_stride x_scale_row_stride x_scale_stride scale_stride turned_scale_stride")
    turned = {"turned": e4m3, "turned_scale": scale} | sizes | strides
    shape = {"POWER_OF_TWO": False, "COLUMNS": columns, "TILE": 128}
    nothing = dict.fromkeys(("values", "scale"))
    for types, constants in (
        ({"x": "*bf16"}, {"x_scale": None, "FROM_TILES": False, "WITH_ROWS": False} | nothing),
        (
            {"x": "*bf16", "values": e4m3, "scale": scale},
            {"x_scale": None, "FROM_TILES": False, "WITH_ROWS": True},
        ),
        ({"x": e4m3, "x_scale": scale}, {"FROM_TILES": True, "WITH_ROWS": False} | nothing),
    ):
        options: dict[str, Any] = {"num_warps": transposing_warps}
        if constants["WITH_ROWS"]:
            options = dict(zip(("num_warps", "maxnreg"), tiles.BOTH, strict=True))
        yield Variant(tiles.transposing_kernel, types | turned, constants | shape, options)


def of_blocks() -> Iterator[Variant]:
    """Quantisation of weights, and their transposition."""
    from dsv3.ops.kernels import blocks

    sizes, options = i32("rows columns"), {"num_warps": blocks.WARPS}
    for weight in ("*bf16", "*fp32"):
        types = {"weight": weight, "values": "*fp8e4nv", "scale": "*fp32"} | sizes
        yield Variant(blocks.quantize_kernel, types, {"POWER_OF_TWO": False, "BLOCK": 128}, options)
    types = {"values": "*u8", "scale": "*fp32", "turned": "*u8", "turned_scale": "*fp32"} | sizes
    yield Variant(blocks.transpose_kernel, types, {"BLOCK": 128}, options)


def of_rms_norm() -> Iterator[Variant]:
    """With tiles and without, of the widths of DeepSeek-V3's norms."""
    from dsv3.ops.kernels import rms_norm

    elements, warps = rms_norm.FORWARD
    types = {"x": "*bf16", "weight": "*fp32", "out": "*bf16"} | i32("rows columns x_stride") | {"eps": "fp32"}
    tiles = {"values": "*fp8e4nv", "scale": "*fp32"} | i32("scale_stride")
    for width in (512, 2048, 8192):
        shape = {"ROWS": elements // width, "TILES": width // 128, "TILE": 128, "POWER_OF_TWO": False}
        yield Variant(rms_norm.forward_kernel, types | tiles, {"QUANTISE": True} | shape, {"num_warps": warps})
    nothing = {"QUANTISE": False, "values": None, "scale": None, "scale_stride": 0}
    yield Variant(rms_norm.forward_kernel, types, nothing | shape, {"num_warps": warps})
    elements, warps, stages = rms_norm.BACKWARD
    types = dict.fromkeys(("grad", "x", "grad_x"), "*bf16") | dict.fromkeys(("weight", "partial"), "*fp32")
    types |= i32("rows columns grad_stride x_stride") | {"eps": "fp32"}
    for width in (512, 8192):
        shape = {"ROWS": elements // width, "COLUMNS": width, "STAGES": stages}
        yield Variant(rms_norm.backward_kernel, types, shape, {"num_warps": warps})


def of_swiglu() -> Iterator[Variant]:
    """With tiles and without, with weights and without."""
    from dsv3.ops.kernels import swiglu

    rows, warps = swiglu.QUANTISING
    tiles = {"gate_up": "*bf16", "values": "*fp8e4nv", "scale": "*fp32"} | i32("rows columns stride scale_stride")
    shape = {"POWER_OF_TWO": False, "ROWS": rows, "TILE": 128}
    yield Variant(swiglu.tiles_kernel, tiles, {"WEIGHTED": False, "weight": None} | shape, {"num_warps": warps})
    yield Variant(swiglu.tiles_kernel, tiles | {"weight": "*fp32"}, {"WEIGHTED": True} | shape, {"num_warps": warps})
    block, warps = swiglu.ALONE
    types = {"gate_up": "*bf16", "out": "*bf16"} | i32("columns stride")
    yield Variant(swiglu.forward_kernel, types, {"BLOCK": block}, {"num_warps": warps})
    types = dict.fromkeys(("grad", "gate_up", "grad_gate_up"), "*bf16") | i32("columns grad_stride stride")
    nothing = dict.fromkeys(("weight", "grad_weight", "act")) | {"WEIGHTED": False, "WITH_ACT": False}
    yield Variant(swiglu.backward_kernel, types, nothing | {"BLOCK": block}, {"num_warps": warps})
    types |= {"weight": "*fp32", "grad_weight": "*fp32", "act": "*bf16"}
    everything = {"WEIGHTED": True, "WITH_ACT": True, "BLOCK": block}
    yield Variant(swiglu.backward_kernel, types, everything, {"num_warps": warps})


def main() -> None:
    """Compiles all; raises what the compiler raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for each in variants():
        source = ASTSource(each.kernel, each.types | dict.fromkeys(each.constants, "constexpr"), each.constants)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=each.options)
        name = each.kernel.__name__
        assert made.metadata.shared <= SHARED_MEMORY, f"{name} takes {made.metadata.shared} bytes of shared memory"
        assert each.contains in made.asm["ptx"], f"{name}: no {each.contains} in its PTX"
        print(f"compiled {name} {each.constants}")


if __name__ == "__main__":
    main()
