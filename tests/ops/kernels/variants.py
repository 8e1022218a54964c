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
    yield from ()


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
