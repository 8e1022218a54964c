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
    yield from of_e5m6()
    yield from of_rotary()
    yield from of_blocks()
    yield from of_rms_norm()
    yield from of_swiglu()
    yield from permute()
    yield from sort()
    yield from of_rooms()
    yield from router()
    yield from cross_entropy()
    yield from products_fp8()
    yield from of_tail()
    yield from of_adamw()
    yield from of_accumulate()
    yield from attention()
    yield from pages()
    yield from paged_attention()


def i32(names: str) -> dict[str, str]:
    """Types of integers, named in one string."""
    return dict.fromkeys(names.split(), "i32")


def of_adamw() -> Iterator[Variant]:
    """The optimizer's update."""
    from dsv3.ops.kernels import adamw

    block, warps = adamw.CONFIG
    pointers = dict.fromkeys(("weight", "grad", "step", "keep", "scale"), "*fp32") | dict.fromkeys(
        ("first", "second"), "*bf16"
    )
    numbers = {"size": "i32"} | dict.fromkeys(("lr", "eps", "weight_decay"), "fp32")
    constants = {"BETA1": 0.9, "BETA2": 0.95, "BLOCK": block}
    yield Variant(adamw.update_kernel, pointers | numbers, constants, {"num_warps": warps})


def of_accumulate() -> Iterator[Variant]:
    """BF16 added to FP32."""
    from dsv3.ops.kernels import accumulate

    block, warps = accumulate.CONFIG
    types = {"total": "*fp32", "gradient": "*bf16", "size": "i32"}
    yield Variant(accumulate.add_kernel, types, {"BLOCK": block}, {"num_warps": warps})


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
    turned = {"turned": e4m3, "turned_scale": scale} | sizes | strides | i32("words")
    shape = {"IN_WORDS": True, "POWER_OF_TWO": False, "COLUMNS": columns, "TILE": 128}
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


def of_e5m6() -> Iterator[Variant]:
    """Twelve bits an element, and back."""
    from dsv3.ops.kernels import e5m6

    rows, warps = e5m6.CONFIG
    sizes, constants = i32("rows columns packed_stride scale_stride"), {"DROPPED": 4, "ROWS": rows, "TILE": 128}
    for x in ("*bf16", "*fp32"):
        pointers = {"packed": "*i32", "scale": "*fp32"} | sizes
        yield Variant(e5m6.pack_kernel, {"x": x} | pointers | i32("x_stride"), constants, {"num_warps": warps})
        types = {"out": x} | pointers | i32("scale_row_stride")
        yield Variant(e5m6.unpack_kernel, types, constants, {"num_warps": warps})


def of_rotary() -> Iterator[Variant]:
    """Heads of DeepSeek-V3 put together, and their gradients taken apart."""
    from dsv3.ops.kernels import rotary

    heads, warps = rotary.HEADS
    shape, options = {"HEADS": heads, "CONTENT": 128}, {"num_warps": warps}
    sizes = i32("tokens heads content")
    strides = i32("pairs x_batch x_token x_head turn_batch turn_token")
    for backwards in (False, True):
        types = {"x": "*bf16", "turn": "*fp32", "out": "*bf16"} | sizes | strides
        yield Variant(rotary.rotate_kernel, types, shape | {"PAIRS": 32, "BACKWARDS": backwards}, options)
    strides = i32("rotary kv_batch kv_token kv_head key_batch key_token")
    types = {"kv": "*bf16", "key": "*bf16", "out": "*bf16"} | sizes | strides
    yield Variant(rotary.keys_kernel, types, shape | {"ROTARY": 64}, options)
    strides = i32("rotary value keys_batch keys_token keys_head values_batch values_token values_head")
    types = dict.fromkeys(("grad_keys", "grad_values", "grad_kv", "grad_key"), "*bf16") | sizes | strides
    yield Variant(rotary.keys_backward_kernel, types, shape | {"ROTARY": 64, "VALUE": 128}, options)


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
    tiles = {"gate_up": "*bf16", "values": "*fp8e4nv", "scale": "*fp32"} | i32("rows columns room stride scale_stride")
    shape = {"POWER_OF_TWO": False, "ROWS": rows, "TILE": 128}
    sorted_rows = {"IN_ROOMS": False, "counts": None} | shape
    yield Variant(swiglu.tiles_kernel, tiles, {"WEIGHTED": False, "weight": None} | sorted_rows, {"num_warps": warps})
    tiles["weight"] = "*fp32"
    yield Variant(swiglu.tiles_kernel, tiles, {"WEIGHTED": True} | sorted_rows, {"num_warps": warps})
    in_rooms = {"WEIGHTED": True, "IN_ROOMS": True} | shape
    yield Variant(swiglu.tiles_kernel, tiles | {"counts": "*i64"}, in_rooms, {"num_warps": warps})
    block, warps = swiglu.ALONE
    types = {"gate_up": "*bf16", "out": "*bf16"} | i32("columns stride")
    for weight in (None, "*fp32"):
        more = {"WEIGHTED": weight is not None, "BLOCK": block}
        if weight is None:
            yield Variant(swiglu.forward_kernel, types, more | {"weight": None}, {"num_warps": warps})
        else:
            yield Variant(swiglu.forward_kernel, types | {"weight": weight}, more, {"num_warps": warps})
    types = dict.fromkeys(("grad", "gate_up", "grad_gate_up"), "*bf16") | i32("columns grad_stride stride")
    nothing = dict.fromkeys(("weight", "grad_weight", "act")) | {"WEIGHTED": False, "WITH_ACT": False}
    yield Variant(swiglu.backward_kernel, types, nothing | {"BLOCK": block}, {"num_warps": warps})
    types |= {"weight": "*fp32", "grad_weight": "*fp32", "act": "*bf16"}
    everything = {"WEIGHTED": True, "WITH_ACT": True, "BLOCK": block}
    yield Variant(swiglu.backward_kernel, types, everything, {"num_warps": warps})


def permute() -> Iterator[Variant]:
    """Rows in BF16; eight experts a token, and six."""
    from dsv3.ops.kernels.permute import COLUMNS_WARPS, PADDING_ROWS, copy_kernel, sum_kernel

    size, warps = COLUMNS_WARPS["copy"]
    for k, padded in ((8, True), (6, False)):
        real = {"real": "*u8"} if padded else {}
        nothing = {} if padded else {"real": None}
        constants = {"K": k, "COLUMNS": size, "PADDED": padded, "ROWS": PADDING_ROWS}
        types = {"x": "*bf16", "row": "*i64", "out": "*bf16", "tokens": "i32", "rows": "i32", "columns": "i32"}
        yield Variant(copy_kernel, types | real, constants | nothing, {"num_warps": warps})
    size, warps = COLUMNS_WARPS["sum"]
    types = {"rows": "*bf16", "row": "*i64", "out": "*bf16", "columns": "i32"}
    yield Variant(sum_kernel, types, {"K": 8, "COLUMNS": size}, {"num_warps": warps})


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
    yield Variant(place_kernel, types | {"real": "*u8"}, constants | {"ALIGNED": True, "MARKED": True}, warps)
    yield Variant(place_kernel, types, constants | {"ALIGNED": False, "MARKED": False, "real": None}, warps)


def of_rooms() -> Iterator[Variant]:
    """Eight experts a token: a lone token, and as many as decode in rooms."""
    from dsv3.ops.kernels import rooms

    types = {"expert": "*i64", "weight": "*fp32", "row": "*i64", "weight_of_row": "*fp32", "counts": "*i64"}
    for block in (8, 1024):
        yield Variant(rooms.assign_kernel, types | i32("assignments room"), {"BLOCK": block}, {"num_warps": 4})
    tiles, warps = rooms.ROWS
    types = {"x": "*bf16", "row": "*i64", "values": "*fp8e4nv", "scale": "*fp32"} | i32("columns x_stride scale_stride")
    yield Variant(rooms.rows_kernel, types, {"K": 8, "TILES": tiles, "TILE": 128}, {"num_warps": warps})


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


def products_fp8() -> Iterator[Variant]:
    """Grouped products; those of one group are the dense fallback."""
    from dsv3.ops.kernels import (
        grouped_gemm_fp8,
        grouped_gemm_fp8_gluon,
        grouped_gemm_fp8_masked,
        grouped_wgrad_fp8,
        grouped_wgrad_fp8_gluon,
        grouped_wgrad_gluon,
    )

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
    gluon = grouped_wgrad_fp8_gluon
    rows, columns = gluon.ROWS, gluon.COLUMNS
    types = {"counts": "*i64", "out": f"tensordesc<fp32[1, 64, 128],{gluon.FINISHED!r}>"} | i32("E N K")
    for side, block in (("grad", rows), ("x", columns)):
        types[side] = f"tensordesc<fp8e4nv[{block}, 128],{gluon.OPERAND!r}>"
        types[f"{side}_scale"] = f"tensordesc<fp32[1, {block}],{gluon.SCALES!r}>"
    shape = {"BLOCK_N": rows, "BLOCK_K": columns, "STAGES": gluon.STAGES, "GROUP": gluon.GROUP}
    for accumulate, written in (
        (False, "cp.async.bulk.tensor.3d.global"),
        (True, "cp.reduce.async.bulk.tensor.3d.global"),
    ):
        constants = shape | {"ACCUMULATE": accumulate}
        yield Variant(gluon.wgrad_kernel, types, constants, {"num_warps": 4}, contains=written)
    in_bf16 = grouped_wgrad_gluon
    tokens, types = in_bf16.TOKENS, {"counts": "*i64", "out": types["out"]} | i32("E N K")
    for side, block in (("grad", 64), ("x", columns)):
        types[side] = f"tensordesc<bf16[{tokens}, {block}],{in_bf16.OPERAND!r}>"
    constants = shape | {"STAGES": in_bf16.STAGES, "BLOCK_T": tokens}
    yield Variant(in_bf16.add_wgrad_kernel, types, constants, {"num_warps": 4}, contains="m64n256k16.f32.bf16.bf16")


def of_tail() -> Iterator[Variant]:
    """Zeros behind the last of four experts, and of 256."""
    from dsv3.ops.kernels import tail

    rows, columns = tail.BLOCK
    types = {"out": "*bf16", "counts": "*i64"} | i32("rows columns E")
    for experts in (4, 256):
        yield Variant(tail.clear_kernel, types, {"EXPERTS": experts, "ROWS": rows, "COLUMNS": columns})


def attention() -> Iterator[Variant]:
    """DeepSeek-V3's heads and those of the small presets, with documents; and one sequence of one document."""
    from dsv3.ops.kernels import attention as kernels
    from dsv3.ops.kernels import documents as bounds_of

    for backwards in (False, True):
        types = {"segment": "*i64", "out": "*i32"} | i32("T stride")
        constants = {"BACKWARDS": backwards, "CHUNK": bounds_of.CHUNK}
        yield Variant(bounds_of.bounds_kernel, types, constants, {"num_warps": 4})
    for (part, rest, value), documents in (
        ((128, 64, 128), True),
        ((64, 32, 64), True),
        ((32, 0, 32), True),
        ((128, 64, 128), False),
    ):
        for kernel, config, bounds, outputs in (
            (kernels.forward_kernel, kernels.FORWARD, "start", ("out",)),
            (kernels.queries_kernel, kernels.QUERIES, "start", ("grad_parts", "out", "grad_q")),
            (kernels.keys_kernel, kernels.KEYS, "end", ("grad_parts", "grad_k", "grad_v")),
        ):
            rows, columns = config.queries, config.keys
            shapes = {
                "q_parts": (rows, part), "q_rests": (rows, rest), "k_parts": (columns, part), "k_rests": (columns, rest),
                "v_parts": (columns, value),
            }  # fmt: skip
            types = dict.fromkeys(outputs, "*bf16") | {"log_sum": "*fp32", "T": "i32", "scale": "fp32"}
            if "grad_parts" in outputs:
                shapes["grad_parts"] = (rows, value)
                types["inner"] = "*fp32"
            constants: dict[str, Any] = {"Q_PART": part, "Q_REST": rest, "V": value, "QUERIES": rows, "KEYS": columns}
            for name, (down, across) in shapes.items():
                if across:
                    types[name] = f"tensordesc<bf16[1, 1, {down}, {across}]>"
                else:
                    constants[name] = None
            if documents:
                types[bounds] = "*i32"
            else:
                constants[bounds] = None
            options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
            yield Variant(kernel, types, constants, options, "wgmma.mma_async")


def pages() -> Iterator[Variant]:
    """Tokens as they are and packed."""
    from dsv3.ops.kernels.latent_pages import WARPS, store_kernel

    types = {"slots": "*i64", "latent": "*bf16", "key": "*bf16"} | i32("latent_stride key_stride")
    shape = {"LATENT": 512, "ROTATED": 64, "TILE": 128, "TILES": 4, "KEY_BLOCK": 64}
    packed = {"pages": "*u8", "words": "*fp32", "halves": "*bf16"}
    yield Variant(store_kernel, types | packed, shape | {"SIZE": 656, "PACKED": True}, {"num_warps": WARPS})
    plain = {"SIZE": 576, "PACKED": False, "words": None, "halves": None}
    yield Variant(store_kernel, types | {"pages": "*bf16"}, shape | plain, {"num_warps": WARPS})


def paged_attention() -> Iterator[Variant]:
    """Few rows and many, in BF16 and packed; pieces combined; the kernel in Gluon."""
    from dsv3.ops.kernels import paged_attention, paged_attention_gluon

    results = {"table": "*i32", "lengths": "*i32", "out": "*bf16"} | dict.fromkeys(
        ("lse", "piece", "piece_lse"), "*fp32"
    )
    sizes = i32("batch tokens heads table_stride parts") | {"scale": "fp32"}
    shape = {"LATENT": 512, "ROTATED": 64, "TILE": 128, "PAGE": 64, "BATCH": 256}
    bf16 = {"values": "*bf16"}, {"SIZE": 576, "PACKED": False, "words": None, "halves": None}
    packed = {"values": "*u8", "words": "*fp32", "halves": "*bf16"}, {"SIZE": 656, "PACKED": True}
    for config in (paged_attention.FEW, paged_attention.MANY):
        for types, constants in (bf16, packed):
            yield Variant(
                paged_attention.decode_kernel,
                {"q": "*bf16"} | types | results | sizes,
                shape | constants | {"ROWS": config.rows},
                {"num_warps": config.warps, "num_stages": config.stages},
            )
    del results["table"]
    for combined in paged_attention.COMBINED.values():
        shape = {
            "LATENT": 512,
            "PAGE": 64,
            "ROWS": combined.rows,
            "COLUMNS": combined.columns,
            "PIECES": combined.pieces,
        }
        types = results | i32("batch rows parts")
        options = {"num_warps": combined.warps}
        yield Variant(paged_attention.combine_kernel, types, shape | {"BATCH": 256, "PARTS": 128}, options)
    operand = paged_attention_gluon.OPERAND
    wide, rotated = (f"tensordesc<bf16[64, {size}],{operand!r}>" for size in (512, 64))
    types = {"q": wide, "q_rotated": rotated, "pages_key": rotated, "table": "*i32"} | results | sizes
    for pages, absent in (({"pages": wide}, "words"), ({"words": "*i32"}, "pages")):
        constants = {"PAGE": 64, "BATCH": 256, "PACKED": absent == "pages", absent: None}
        kernel = paged_attention_gluon.decode_kernel
        yield Variant(kernel, types | pages, constants, {"num_warps": 8}, contains="wgmma.mma_async")


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
