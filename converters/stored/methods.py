"""How each quantization names and shapes its tensors: from a checkpoint's tensors to the weights they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from converters.errors import FormatError
from converters.safetensors_file import StoredTensor
from converters.shards import Shards
from converters.stored.columns import AWQ, GPTQ, PackedColumns
from converters.stored.lookup import ROUNDED, Lookup, Nested
from converters.stored.packed import Packed
from converters.stored.scaled import FLOAT8, SCALE, scaled
from converters.stored.settings import REFUSED, block_of, one_of, refused, whole
from converters.stored.tensor import FLOATS, Dequantized, Found, Parts, Problems, Settings

SIZES = range(1, 2**31)
# Scales of activations and of the KV cache: what runs them quantizes neither (`dequant_model` passes them over too).
UNUSED = (
    "activation_scale", ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale",
    ".v_scale", ".q_scale", ".input_global_scale",
)  # fmt: skip
Method = Callable[[Settings, Parts, Shards, Problems], Found]


def _fp8(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    block = block_of(settings.get("weight_block_size"))
    what = f"FP8 in blocks of {block[0]}x{block[1]}" if block else "FP8"
    return _with_scales(tensors, problems, what, FLOAT8, ("_scale_inv", ".weight_scale"), block)


def _modelopt(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    algorithm = settings.get("quant_algo")
    if algorithm != "FP8":
        raise refused(f"ModelOpt's {algorithm or 'mixed formats'}")
    return _with_scales(tensors, problems, "FP8 (ModelOpt)", FLOAT8, (".weight_scale",), None)


def _compressed_tensors(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    weights = _weights_of_groups(settings)
    kind, sparsity = str(settings.get("format") or weights["format"]), settings.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity or "dense"
    if sparse != "dense":
        raise refused(f"{sparse} (compressed-tensors)")
    if settings.get("transform_config"):
        raise refused("compressed-tensors", " with rotations of their own (transform_config)")
    if kind == "dense":
        return Found({}, frozenset(), "dense")
    if kind in ("float-quantized", "int-quantized", "naive-quantized"):
        strategy = one_of(weights, "strategy", "tensor", "channel", "block", "group")
        group = (1, whole(weights, "group_size", among=SIZES)) if strategy == "group" else None
        block = block_of(weights.get("block_structure")) if strategy == "block" else group
        what = f"{kind} (compressed-tensors)"
        return _with_scales(tensors, problems, what, (*FLOAT8, "I8"), (".weight_scale",), block)
    if kind == "pack-quantized":
        one_of(weights, "type", "int")
        one_of(weights, "strategy", "group", "channel")
        return _packed(weights, tensors, shards, problems)
    raise refused(kind, "" if kind in REFUSED else " (compressed-tensors)")


def _weights_of_groups(settings: Settings) -> dict[str, Any]:
    """The settings of weights, which every group of layers has to share."""
    groups = settings.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    if not found or not all(isinstance(each, Mapping) and isinstance(each.get("weights"), Mapping) for each in found):
        raise refused("compressed-tensors", " whose config_groups do not all say how weights are stored")
    each = [{**group["weights"], "format": group.get("format") or settings.get("format")} for group in found]
    matter = ("num_bits", "type", "strategy", "group_size", "block_structure", "format")
    if any(group.get(key) != each[0].get(key) for group in each for key in matter):
        raise refused("compressed-tensors", f" of more than one kind ({len(found)} config_groups)")
    return each[0]


def _with_scales(
    tensors: Parts,
    problems: Problems,
    what: str,
    dtypes: tuple[str, ...],
    ends: tuple[str, ...],
    block: tuple[int, int] | None,
) -> Found:
    """Weights that kept their name, and have a scale beside them."""
    weights: dict[str, Dequantized] = {}
    used = {name for name in tensors if name.endswith(UNUSED)}
    for name, scale in tensors.items():
        end = next((end for end in ends if name.endswith(end)), "")
        if not end or name in used:
            continue
        base = name.removesuffix("_scale_inv" if end == "_scale_inv" else "_scale")
        zero = tensors.get(f"{base}_zero_point")
        stored, kept = problems.part(tensors, base, dtypes), problems.part(tensors, name, SCALE)
        if stored and kept and (zero is None or problems.part(tensors, zero.name, ("I8", *FLOAT8))):
            made = scaled(base, stored, scale, block, problems, zero=zero)
            weights |= {base: made} if made else {}
        used |= {name, *([zero.name] if zero else [])}
    return Found(weights, frozenset(used), what)


def _packed(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    bits = whole(settings, "num_bits", among=range(2, 9))
    is_grouped = settings.get("strategy", "group") == "group"
    group = whole(settings, "group_size", among=SIZES) if is_grouped else 0
    weights: dict[str, Dequantized] = {}
    used = {name for name in tensors if name.endswith(UNUSED)}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        base = name.removesuffix("_packed")
        parts = {end: f"{base}_{end}" for end in ("packed", "scale", "shape", "zero_point", "g_idx")}
        used |= set(parts.values()) & set(tensors)
        packed, scale = problems.part(tensors, name, ("I32",)), problems.part(tensors, parts["scale"], FLOATS)
        stated = problems.part(tensors, parts["shape"], ("I32", "I64"))
        if not (packed and scale and stated and problems.shape(stated, (2,))):
            continue
        rows, columns = (int(size) for size in shards.rows(stated)[0])
        each = group or max(1, columns)
        groups, per_word = -(-columns // each), 32 // bits
        zero, order = (_optional(tensors, parts[end], problems) for end in ("zero_point", "g_idx"))
        fits = problems.shape(packed, (rows, -(-columns // per_word))) and problems.shape(scale, (rows, groups))
        fits = fits and (zero is None or problems.shape(zero, (-(-rows // per_word), groups)))
        if fits and rows > 0 and columns > 0 and (order is None or problems.shape(order, (columns,))):
            problems += [f"{base}: is there beside {name}"] if base in tensors else []
            order = None if order is None or (shards.rows(order) < 0).any() else order  # -1 where it was never set
            weights[base] = Packed(base, "F32", (rows, columns), packed.file, packed, scale, zero, order, bits, each)
    return Found(weights, frozenset(used), f"packed {bits}-bit integers (compressed-tensors)")


def _gptq(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    bits = whole(settings, "bits", among=(2, 4, 8))
    form = one_of(settings, "checkpoint_format", "gptq", "gptq_v2", "")
    if settings.get("is_marlin_format"):
        raise refused("marlin")
    per_word, offset = 32 // bits, 0 if form == "gptq_v2" else 1

    def shape_of(words: StoredTensor) -> tuple[int, int]:
        return words.shape[1], words.shape[0] * per_word

    return _columns(settings, tensors, problems, GPTQ, bits, offset, shape_of, f"GPTQ ({bits} bits)")


def _awq(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    bits = whole(settings, "bits", among=(4,))
    one_of({"version": str(settings.get("version") or "gemm").lower()}, "version", "gemm")
    one_of(settings, "checkpoint_format", "gemm", "awq")

    def shape_of(words: StoredTensor) -> tuple[int, int]:
        return words.shape[1] * 8, words.shape[0]

    return _columns(settings, tensors, problems, AWQ, bits, 0, shape_of, f"AWQ ({bits} bits)")


def _columns(
    settings: Settings,
    tensors: Parts,
    problems: Problems,
    kind: type[PackedColumns],
    bits: int,
    zero_offset: int,
    shape_of: Callable[[StoredTensor], tuple[int, int]],
    what: str,
) -> Found:
    weights: dict[str, Dequantized] = {}
    used: set[str] = set()
    stated = settings.get("group_size", -1)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        used |= {f"{module}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx")} & set(tensors)
        words, zeros = (problems.part(tensors, f"{module}.{end}", ("I32",)) for end in ("qweight", "qzeros"))
        scales = problems.part(tensors, f"{module}.scales", FLOATS)
        order = _optional(tensors, f"{module}.g_idx", problems)
        if not (words and zeros and scales):
            continue
        if len(words.shape) != 2 or len(scales.shape) != 2 or 0 in (*words.shape, *scales.shape):
            problems.append(f"{name}: has shape {words.shape} and scales of shape {scales.shape}, expected matrices")
            continue
        (rows, columns), groups = shape_of(words), scales.shape[0]
        group = stated if type(stated) is int and stated > 0 else -(-columns // groups)
        neighbours = -(-columns // group)
        fits = problems.shape(scales, (groups if order else neighbours, rows))
        fits = fits and problems.shape(zeros, (groups, -(-rows * bits // 32)))
        if fits and (order is None or problems.shape(order, (columns,))):
            weight = f"{module}.weight"
            problems += [f"{weight}: is there beside {name}"] if weight in tensors else []
            weights[weight] = kind(
                weight, "F32", (rows, columns), words.file, words, zeros, scales, order, bits, group, zero_offset
            )
    return Found(weights, frozenset(used), what)


def _bitsandbytes(settings: Settings, tensors: Parts, shards: Shards, problems: Problems) -> Found:
    weights: dict[str, Dequantized] = {}
    used: set[str] = set()
    for name in tensors:
        base, found, _ = name.partition(".quant_state.bitsandbytes__")
        if found:
            parts = {end: f"{base}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
            used |= {name, *parts.values()} & set(tensors)
            four_bit = _lookup(base, _quant_state(tensors[name], shards), parts, tensors, problems)
            weights |= {base: four_bit} if four_bit else {}
        elif name.endswith(".SCB"):
            base, form = name.removesuffix("SCB") + "weight", name.removesuffix("SCB") + "weight_format"
            used |= {name, form} & set(tensors)
            stored, scale = problems.part(tensors, base, ("I8",)), problems.part(tensors, name, ("F32",))
            if form in tensors and shards.read(tensors[form], 0, tensors[form].size_bytes).strip(b"\0"):
                problems.append(f"{form}: weights that are not row by row")
            made = scaled(base, stored, scale, None, problems, is_int8=True) if stored and scale else None
            weights |= {base: made} if made else {}
    kinds = {"LLM.int8" if not isinstance(weight, Lookup) else "4 bits" for weight in weights.values()}
    return Found(weights, frozenset(used), f"bitsandbytes ({' and '.join(sorted(kinds))})")


def _quant_state(tensor: StoredTensor, shards: Shards) -> dict[str, Any]:
    try:
        state = json.loads(shards.read(tensor, 0, tensor.size_bytes))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise FormatError(f"{tensor.file}: {tensor.name} is not valid JSON")
    return state


def _lookup(
    name: str, state: Mapping[str, Any], parts: Mapping[str, str], tensors: Parts, problems: Problems
) -> Lookup | None:
    """A 4-bit weight of bitsandbytes; None where its parts do not fit, which is noted."""
    shape, block, dtype = state.get("shape"), state.get("blocksize"), ROUNDED.get(str(state.get("dtype")))
    if not (isinstance(shape, list) and len(shape) >= 1 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        problems.append(f"{name}: its quant_state has shape {shape!r}")
        return None
    if type(block) is not int or block not in SIZES or dtype is None:
        problems.append(f"{name}: its quant_state has blocksize {block!r} and dtype {state.get('dtype')!r}")
        return None
    count = prod(shape)
    codes = problems.part(tensors, name, ("U8", "BF16", "F16", "F32"))
    table = problems.part(tensors, parts["quant_map"], ("F32",))
    nested = _nested(state, -(-count // block), parts, tensors, problems) if parts["nested_absmax"] in tensors else None
    wanted = ("U8",) if parts["nested_absmax"] in tensors else FLOATS
    absmax = problems.part(tensors, parts["absmax"], wanted)
    if not (codes and table and absmax and problems.shape(table, (16,))):
        return None
    if codes.size_bytes != -(-count // 2):
        problems.append(f"{name}: has {codes.size_bytes} bytes, shape {shape} takes {-(-count // 2)}")
        return None
    if not problems.shape(absmax, (-(-count // block),)):
        return None
    return Lookup(name, dtype, tuple(shape), codes.file, codes, table, absmax, block, nested)


def _nested(
    state: Mapping[str, Any], count: int, parts: Mapping[str, str], tensors: Parts, problems: Problems
) -> Nested | None:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    table, absmax = (problems.part(tensors, parts[end], ("F32",)) for end in ("nested_quant_map", "nested_absmax"))
    if type(block) is not int or block not in SIZES or not isinstance(offset, int | float):
        problems.append(f"{parts['absmax']}: its quant_state has nested_blocksize {block!r}, nested_offset {offset!r}")
        return None
    if table and absmax and problems.shape(table, (256,)) and problems.shape(absmax, (-(-count // block),)):
        return Nested(table, absmax, block, float(offset))
    return None


def _optional(tensors: Parts, name: str, problems: Problems) -> StoredTensor | None:
    return problems.part(tensors, name, ("I32", "I64")) if name in tensors else None


METHODS: Mapping[str, Method] = {
    "fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
