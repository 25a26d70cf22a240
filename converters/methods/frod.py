"""FRoD (doi:10.1609/aaai.v40i31.39813): W = U @ diag(L) @ V.T becomes U @ (S + diag(lambda_l)) @ V.T, S sparse.

    base_model.frod_V.<category>          (columns, columns)    layers of one kind ("mlp_up_proj") share V
    base_model.frod_s_indices.<category>  (2, count)            and the places of S
    base_model.frod_s_size.<category>     (2,)                  columns, twice
    <module>.frod_lambda_l                (columns,)
    <module>.frod_lambda_s_values         (count,)

U is the base's own: the columns of W @ inverse(V).T, each divided by its length. Where all layers of a kind together
have fewer rows than columns, some of them are what rounding left of zero, and take the base's weights to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, Whole
from converters.peft_settings import Setting

SMALLEST = 1e-12  # a column of U this short is zero
SMALLEST_SINGULAR = 1e-6  # of the largest singular value of V; smaller ones count as zero where V has no inverse
NOT_SAVED = "V comes from a decomposition whose signs are the training machine's: save with save_projection=True"


def read(module: Module) -> Iterator[Change]:
    v, indices, size = (f"{role}.{category(module.name)}" for role in ("v", "indices", "size"))
    if missing := [role for role in (v, indices, size) if role not in module]:
        raise ModuleProblem(f"the adapter has no {', '.join(missing)}")
    module.check("lambda_l", None)
    (columns,) = module.shape("lambda_l")
    module.check(v, columns, columns)
    module.check("values", *module.shape("values")[:1])
    if module.shape(indices) != (2, *module.shape("values")) or module.integers(size).tolist() != [columns, columns]:
        raise ModuleProblem(f"S has {module.shape(indices)} places and {module.shape('values')} values")
    places = module.integers(indices)
    if places.size and (places.min() < 0 or places.max() >= columns):
        raise ModuleProblem(f"S is ({columns}, {columns}), and its places go from {places.min()} to {places.max()}")

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        middle = _middle(module.load("lambda_l"), places, module.load("values"))
        return _decomposed(weight, module.load(v)) @ (middle @ module.load(v).T)

    yield Transformed(module.weight, (None, columns), apply, by_rows=False)


def category(name: str) -> str:
    """What the layers of one kind are called: "mlp_up_proj", "c_fc"; as `_category_from_key` (tuners/frod/model.py)."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])


def _decomposed(weight: Floats, v: Floats) -> Floats:
    """U, (rows, columns), computed in float64 as PEFT does."""
    wide, basis = weight.astype(np.float64), v.astype(np.float64)
    try:
        u = np.linalg.solve(basis, wide.T).T
    except np.linalg.LinAlgError:
        u = wide @ np.linalg.pinv(basis, rcond=SMALLEST_SINGULAR).T
    lengths = np.linalg.norm(u, axis=0)
    directions: Floats = np.divide(u, lengths, out=np.zeros_like(u), where=lengths > SMALLEST).astype(np.float32)
    return directions


def _middle(diagonal: Floats, places: Whole, values: Floats) -> Floats:
    """S + diag(lambda_l)."""
    middle = np.diag(diagonal)
    np.add.at(middle, (places[0], places[1]), values)
    return middle


METHOD = Method(
    "FRoD",
    "doi:10.1609/aaai.v40i31.39813",
    parts={".frod_lambda_l": "lambda_l", ".frod_lambda_s_values": "values"},
    shared={"frod_V.": "v.", "frod_s_indices.": "indices.", "frod_s_size.": "size."},
    needed=("lambda_l", "values"),
    read=read,
    settings={"save_projection": Setting(True, lambda value: "" if value is True else NOT_SAVED)},
    free=(
        "fan_in_fan_out", "frod_dropout", "init_weights", "progressbar", "projection_prng_key",
        "regularization_alpha", "runtime_offload_base_weight", "sparse_rate",
    ),
)  # fmt: skip
