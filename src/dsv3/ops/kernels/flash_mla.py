"""DeepSeek's own decoding kernel as a plugin: used where the package is installed and loads."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def no_flash_mla() -> str | None:
    """The reason why the package does not serve; None when it does. What went wrong on import is logged once."""
    try:
        library: Any = import_module("flash_mla")
        # Builds that know the option keep what decodes on sm_90 apart.
        if not library.has_legacy():
            raise ImportError("it has no kernels for sm_90")
    except ModuleNotFoundError as error:
        return f"needs the package flash_mla ({error})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.warning("flash_mla is installed and does not load (wrong build for this torch?): %s", error)
        return f"flash_mla does not load: {error}"
    return None


def decode(
    q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> tuple[Tensor, Tensor]:
    """BF16: see `dsv3.ops.paged_attention.paged_latent_attention`."""
    library: Any = import_module("flash_mla")
    plan, _ = library.get_mla_metadata()
    out, lse_BHT = library.flash_mla_with_kvcache(
        q_BTHL, pages.unsqueeze(2), table_BM, lengths_B, latent, plan, softmax_scale=scale, causal=True, use_legacy=True
    )
    # The package says +inf of what sees nothing.
    lse = lse_BHT.transpose(1, 2)
    return out, torch.where(lse == float("inf"), float("-inf"), lse)
