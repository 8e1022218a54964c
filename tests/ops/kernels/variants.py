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
    yield from permute()
    yield from sort()
    yield from router()
    yield from cross_entropy()


def permute() -> Iterator[Variant]:
    """Rows in BF16, weights in FP32; eight experts a token, and six."""
    from dsv3.ops.kernels.permute import COLUMNS_WARPS, PADDING_ROWS, copy_kernel, products_kernel, sum_kernel

    size, warps = COLUMNS_WARPS["copy"]
    for k, padded in ((8, True), (6, False)):
        real = {"real": "*u8"} if padded else {}
        nothing = {} if padded else {"real": None}
        constants = {"K": k, "COLUMNS": size, "PADDED": padded, "ROWS": PADDING_ROWS}
        types = {"x": "*bf16", "row": "*i64", "out": "*bf16", "tokens": "i32", "rows": "i32", "columns": "i32"}
        yield Variant(copy_kernel, types | real, constants | nothing, {"num_warps": warps})
        size, warps = COLUMNS_WARPS["products"]
        types = {
            "grad": "*bf16", "rows": "*bf16", "weight": "*fp32", "row": "*i64", "grad_rows": "*bf16",
            "grad_weight": "*fp32", "tokens": "i32", "num_rows": "i32", "columns": "i32",
        }  # fmt: skip
        yield Variant(products_kernel, types | real, constants | nothing | {"K_BLOCK": 8}, {"num_warps": warps})
    size, warps = COLUMNS_WARPS["sum"]
    for weight in ("*fp32", None):
        constants = {"K": 8, "COLUMNS": size, "WEIGHTED": weight is not None}
        types = {"rows": "*bf16", "row": "*i64", "out": "*bf16", "columns": "i32"}
        if weight is None:
            yield Variant(sum_kernel, types, constants | {"weight": None}, {"num_warps": warps})
        else:
            yield Variant(sum_kernel, types | {"weight": weight}, constants, {"num_warps": warps})


def sort() -> Iterator[Variant]:
    """256 experts, with alignment and without."""
    from dsv3.ops.kernels.sort import EXPERTS, PART, PARTS, count_kernel, place_kernel, prefix_kernel

    warps = {"num_warps": 4}
    types = {"expert": "*i64", "count": "*i32", "assignments": "i32", "experts": "i32"}
    yield Variant(count_kernel, types, {"PART": PART, "EXPERTS": 256}, warps)
    types = {"count": "*i32", "before": "*i32", "total": "*i32", "parts": "i32", "experts": "i32"}
    yield Variant(prefix_kernel, types, {"PARTS": PARTS, "EXPERTS": EXPERTS}, warps)
    types = {
        "expert": "*i64", "before": "*i32", "total": "*i32", "assignment": "*i64", "row": "*i64", "counts": "*i64",
        "assignments": "i32", "experts": "i32", "aligned": "i32",
    }  # fmt: skip
    constants = {"PART": PART, "EXPERTS": 256}
    yield Variant(place_kernel, types | {"real": "*u8"}, constants | {"ALIGNED": True}, warps)
    yield Variant(place_kernel, types, constants | {"ALIGNED": False, "real": None}, warps)


def router() -> Iterator[Variant]:
    """DeepSeek-V3's 256 experts in 8 groups, 64 without groups, and 72, which is no power of two."""
    from dsv3.ops.kernels.router import GRADIENT_TOKENS, TOKENS_WARPS, gradient_kernel, select_kernel

    tokens, warps = TOKENS_WARPS
    types = {
        "affinity": "*fp32", "bias": "*fp32", "weight": "*fp32", "expert": "*i64", "tokens": "i32", "scaling": "fp32",
    }  # fmt: skip
    for k, groups, size, kept, blocks in ((8, 8, 32, 4, (8, 32)), (6, 1, 64, 1, (1, 64)), (8, 1, 72, 1, (1, 128))):
        constants = {
            "K": k, "G": groups, "S": size, "KEPT": kept, "NORMALISE": True, "G_BLOCK": blocks[0], "S_BLOCK": blocks[1],
            "TOKENS": tokens,
        }  # fmt: skip
        yield Variant(select_kernel, types, constants, {"num_warps": warps})
    types = {
        "grad_weight": "*fp32", "affinity": "*fp32", "expert": "*i64", "grad_affinity": "*fp32", "tokens": "i32",
        "experts": "i32", "scaling": "fp32",
    }  # fmt: skip
    for normalise in (True, False):
        constants = {"K": 8, "K_BLOCK": 8, "NORMALISE": normalise, "TOKENS": GRADIENT_TOKENS}
        yield Variant(gradient_kernel, types, constants, {"num_warps": 4})


def cross_entropy() -> Iterator[Variant]:
    """Logits in BF16; with their gradient, and the losses alone."""
    from dsv3.ops.kernels.cross_entropy import COLUMNS_WARPS_ROWS, loss_kernel

    columns, warps, _ = COLUMNS_WARPS_ROWS
    types = {
        "logits": "*bf16", "target": "*i64", "loss": "*fp32", "rows": "i32", "vocabulary": "i32", "scale": "fp32", "ignore": "i32",
    }  # fmt: skip
    for gradient in (True, False):
        yield Variant(loss_kernel, types, {"COLUMNS": columns, "GRADIENT": gradient}, {"num_warps": warps})


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
