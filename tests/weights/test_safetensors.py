from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from dsv3.weights.safetensors import Stored, read_header, read_headers, read_tensor
from tests.weights.sparse import write_sparse


def test_a_sparse_directory_reads_like_any_other(tmp_path):
    tensors = {"a": ("F8_E4M3", (3, 5)), "b": ("F32", (1, 1)), "c": ("BF16", (7, 10**9)), "d": ("F32", (2, 2))}
    files = write_sparse(tmp_path, tensors, 20)
    assert [file.stat().st_blocks * 512 < 10**5 for file in files] == [True] * 3
    found = read_headers(tmp_path)
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == tensors
    assert [found[name].file for name in "abcd"] == [files[0], files[0], files[1], files[2]]
    assert load_file(files[2])["d"].tolist() == [[0, 0], [0, 0]]


def test_tensors_of_several_pieces_are_put_together(tmp_path):
    """FP8 included, which torch hardly computes with."""
    wanted = {"rows": torch.randn(6, 4), "columns": torch.randn(5, 6).to(torch.float8_e4m3fn), "whole": torch.randn(3)}
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for k, file in enumerate(files):
        part = slice(2 * k, 2 * k + 2)
        save_file({"r": wanted["rows"][part], "c": wanted["columns"][:, part].contiguous(), "w": wanted["whole"]}, file)
    parts = [slice(2 * k, 2 * k + 2) for k in range(3)]
    held = [read_header(file) for file in files]
    stored = {
        "rows": Stored("F32", (6, 4), tuple(replace(h["r"].pieces[0], index=(part,)) for h, part in zip(held, parts, strict=True))),
        "whole": held[1]["w"],
        "columns": Stored(
            "F8_E4M3", (5, 6), tuple(replace(h["c"].pieces[0], index=(slice(None), part)) for h, part in zip(held, parts, strict=True))
        ),
    }  # fmt: skip
    found = {name: read_tensor(each) for name, each in stored.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8))
