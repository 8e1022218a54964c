"""DeepSeek's own kernels as a plugin: used where the package is installed and loads."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.tiles import Tiles

log = logging.getLogger(__name__)


@cache
def no_deep_gemm() -> str | None:
    """The reason why the package does not serve; None when it does. What went wrong on import is logged once."""
    try:
        import_module("deep_gemm")
    except ModuleNotFoundError as error:
        return f"needs the package deep_gemm ({error})"
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("deep_gemm is installed and does not load (wrong build for this torch?): %s", error)
        return f"deep_gemm does not load: {error}"
    return None


def contiguous(x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor) -> Tensor:
    """BF16 [R, N]: see `dsv3.ops.grouped_gemm_fp8`; counts are multiples of 128."""
    from dsv3.ops.kernels.tail import clear_behind

    library: Any = import_module("deep_gemm")
    out = torch.empty(len(x.values), weight_ENK.shape[1], dtype=torch.bfloat16, device=x.values.device)
    layout = expert_of_rows(counts_E, len(x.values))
    library.m_grouped_fp8_gemm_nt_contiguous((x.values, x.scale), (weight_ENK, scale_EPQ.contiguous()), out, layout)
    # The package leaves rows of no group as they were.
    return clear_behind(out, counts_E)


def expert_of_rows(counts_E: Tensor, rows: int) -> Tensor:
    """int32 [rows]: which group a row belongs to; -1 behind the last."""
    row = torch.arange(rows, device=counts_E.device)
    expert = torch.searchsorted(counts_E.cumsum(0), row, right=True)
    return torch.where(expert < len(counts_E), expert, -1).int()
