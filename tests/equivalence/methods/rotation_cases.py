"""Methods that turn inputs or outputs: OFT, BOFT, HRA, RoAD."""

from __future__ import annotations

from collections.abc import Mapping

from tests.equivalence.peft_methods import Case, nudged

EXACT = {"use_cayley_neumann": False}

CASES: Mapping[str, Case] = {
    "oft": Case("OFTConfig"),
    "oft with Cayley's rotation": Case("OFTConfig", EXACT, "llama-biases"),
    **{
        f"oft with {terms} terms": Case("OFTConfig", {"num_cayley_neumann_terms": terms, "oft_block_size": 8})
        for terms in (2, 3, 4, 7)
    },
    "oft by the number of blocks": Case("OFTConfig", {"r": 4, "oft_block_size": 0}),
    "oft with a block size that does not divide": Case("OFTConfig", {**EXACT, "oft_block_size": 13}),
    "oft with a number of blocks that does not divide": Case("OFTConfig", {"r": 7, "oft_block_size": 0}),
    "oft with a shared block": Case("OFTConfig", {**EXACT, "block_share": True, "oft_block_size": 16}),
    "constrained oft": Case("OFTConfig", {**EXACT, "coft": True, "eps": 0.8, "oft_block_size": 16}),
    "constrained oft with a shared block": Case("OFTConfig", {"coft": True, "eps": 0.3, "block_share": True}),
    "boft": Case("BOFTConfig", randomize=nudged(0.3)),
    "boft on biases": Case("BOFTConfig", {"boft_block_size": 16}, "llama-biases", nudged(0.3)),
    "boft by the number of blocks": Case(
        "BOFTConfig", {"boft_block_num": 4, "boft_block_size": 0}, "llama", nudged(0.3)
    ),
    "hra": Case("HRAConfig"),
    "hra of an odd rank": Case("HRAConfig", {"r": 5}, "llama-biases"),
    "hra made orthogonal": Case("HRAConfig", {"apply_GS": True}),
    **{
        variant.replace("_", " "): Case("RoadConfig", {"variant": variant, "group_size": 16}, randomize=nudged(0.3))
        for variant in ("road_1", "road_2", "road_4")
    },
    "road on biases": Case("RoadConfig", {"variant": "road_4", "group_size": 2}, "llama-biases", nudged(0.3)),
}
