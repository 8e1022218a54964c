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
    """num_warps, num_stages."""
    contains: str = ""
    """What its PTX must hold, such as "wgmma"."""


def variants() -> Iterator[Variant]:
    """All of them, one generator an operation."""
    yield from products_fp8()


def products_fp8() -> Iterator[Variant]:
    """Grouped products; those of one group are the dense fallback."""
    from dsv3.ops.kernels import grouped_gemm_fp8, grouped_gemm_fp8_gluon, grouped_gemm_fp8_masked, grouped_wgrad_fp8

    def tile(rows: int) -> str:
        return f"tensordesc<fp8e4nv[{rows}, 128]>"

    sizes = dict.fromkeys(["R", "E", "N", "K", "x_scale_column", "weight_scale_expert", "weight_scale_row"], "i32")
    scales = {"x_scale": "*fp32", "weight_scale": "*fp32"}
    for config, counts, out in (
        (grouped_gemm_fp8.LARGE, "*i64", "*bf16"),
        (grouped_gemm_fp8.SMALL, "*i32", "*bf16"),
        (grouped_gemm_fp8.LARGE, "*i32", "*fp32"),
    ):
        yield Variant(
            grouped_gemm_fp8.contiguous_kernel,
            {"x": tile(config.rows), "weight": tile(config.columns), "counts": counts, "out": out} | scales | sizes,
            {"BLOCK_M": config.rows, "BLOCK_N": config.columns, "BLOCK_K": 128, "GROUP": config.group},
            {"num_warps": config.warps, "num_stages": config.stages},
            contains="wgmma.mma_async",
        )
    kernel, operand = grouped_gemm_fp8_gluon.contiguous_kernel, grouped_gemm_fp8_gluon.OPERAND
    for out in ("*bf16", "*fp32"):
        yield Variant(
            kernel,
            {"x": f"tensordesc<fp8e4nv[128, 128],{operand!r}>", "weight": f"tensordesc<fp8e4nv[256, 128],{operand!r}>"}
            | {"counts": "*i64", "out": out}
            | scales
            | sizes,
            {"BLOCK_M": 128, "BLOCK_N": 256, "STAGES": grouped_gemm_fp8_gluon.STAGES, "GROUP": 8},
            {"num_warps": 4},
            contains="wgmma.mma_async",
        )
    sizes["rows_per_group"] = sizes.pop("R")
    del sizes["E"]
    for rows in (1, 20, 256):
        config = grouped_gemm_fp8_masked.choose(rows)
        yield Variant(
            grouped_gemm_fp8_masked.masked_kernel,
            {"x": tile(config.rows), "weight": tile(config.columns), "counts": "*i64", "out": "*bf16"} | scales | sizes,
            {"BLOCK_M": config.rows, "BLOCK_N": config.columns, "BLOCK_K": 128},
            {"num_warps": config.warps, "num_stages": config.stages},
            contains="wgmma.mma_async",
        )
    sizes = dict.fromkeys(["E", "N", "K", "grad_scale_column", "x_scale_column"], "i32")
    config = grouped_wgrad_fp8.LARGE
    for out, accumulate in (("*fp32", False), ("*fp32", True), ("*bf16", False)):
        yield Variant(
            grouped_wgrad_fp8.wgrad_kernel,
            {"grad": tile(config.rows), "x": tile(config.columns), "grad_scale": "*fp32", "x_scale": "*fp32"}
            | {"counts": "*i64", "out": out}
            | sizes,
            {"BLOCK_N": config.rows, "BLOCK_K": config.columns, "BLOCK_R": 128}
            | {"GROUP": config.group, "ACCUMULATE": accumulate},
            {"num_warps": config.warps, "num_stages": config.stages},
            contains="wgmma.mma_async",
        )


def main() -> None:
    """Compiles all; raises what the compiler raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    for each in variants():
        make = GluonASTSource if each.kernel.is_gluon() else ASTSource
        source = make(each.kernel, each.types | dict.fromkeys(each.constants, "constexpr"), each.constants)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=each.options)
        name = each.kernel.__name__
        assert made.metadata.shared <= SHARED_MEMORY, f"{name} takes {made.metadata.shared} bytes of shared memory"
        assert each.contains in made.asm["ptx"], f"{name}: no {each.contains} in its PTX"
        print(f"compiled {name} {each.constants}")


if __name__ == "__main__":
    main()
