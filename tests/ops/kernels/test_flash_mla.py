"""The plugin as it is found: not installed, for another torch, without what sm_90 needs, and whole."""

import sys
import types

import pytest
import torch

from dsv3.ops.kernels import flash_mla


@pytest.fixture
def install(monkeypatch):
    """Makes `import flash_mla` give an object, or raise."""

    def put(found):
        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "flash_mla":
                    raise found

        monkeypatch.delitem(sys.modules, "flash_mla", raising=False)
        if isinstance(found, Exception):
            monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        else:
            monkeypatch.setitem(sys.modules, "flash_mla", found)
        flash_mla.no_flash_mla.cache_clear()

    yield put
    flash_mla.no_flash_mla.cache_clear()


def package(**functions):
    made = types.ModuleType("flash_mla")
    vars(made).update(functions)
    return made


def test_what_is_not_installed_is_not_logged(install, caplog):
    install(ModuleNotFoundError("No module named 'flash_mla'"))
    assert "needs the package flash_mla" in flash_mla.no_flash_mla()
    assert not caplog.records


@pytest.mark.parametrize(
    "found",
    [
        OSError("undefined symbol: aoti_torch_x"),
        ImportError("no extension"),
        package(),
        package(has_legacy=lambda: False),
    ],
    ids=["symbol", "extension", "upstream", "sm_100 alone"],
)
def test_what_does_not_load_is_logged_once(install, caplog, found):
    install(found)
    for _ in range(2):
        assert "flash_mla does not load" in flash_mla.no_flash_mla()
    assert len(caplog.records) == 1


def test_a_decode_is_causal_scaled_and_says_minus_infinity_of_nothing(install):
    seen = {}

    def call(q, pages, table, lengths, latent, plan, **options):
        seen.update(options, pages=pages.shape, plan=plan)
        lse = torch.tensor([[[1.0, 2.0], [float("inf"), 3.0]]])
        return q[..., :latent], lse

    install(package(has_legacy=lambda: True, get_mla_metadata=lambda: ("plan", None), flash_mla_with_kvcache=call))
    assert flash_mla.no_flash_mla() is None
    q = torch.randn(1, 2, 2, 6)
    out, lse = flash_mla.decode(q, torch.zeros(3, 64, 6), torch.zeros(1, 1), torch.ones(1), 4, 0.5)
    assert torch.equal(out, q[..., :4])
    assert lse.tolist() == [[[1.0, float("-inf")], [2.0, 3.0]]]
    expected = dict(softmax_scale=0.5, causal=True, use_legacy=True, pages=(3, 64, 1, 6), plan="plan")
    assert seen == expected
