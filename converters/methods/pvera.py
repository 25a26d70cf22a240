"""PVeRA (arXiv:2512.07703): VeRA whose inner values have a mean and a variance; evaluation takes the mean.

    base_model.pvera_A           (2 rank, most columns)     base_model.model.<module>.pvera_lambda_d  (2 rank,)
    base_model.pvera_B           (most rows, rank)          base_model.model.<module>.pvera_lambda_b  (rows,)

The first `rank` rows of A and numbers of lambda_d give the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.methods import vera
from converters.methods.changes import Change
from converters.methods.method import Method, Module


def read(module: Module) -> Iterator[Change]:
    yield vera.projected(module, 2 * module.setting("r"))


METHOD = Method(
    "PVeRA",
    "arXiv:2512.07703",
    parts={".pvera_lambda_b": "lambda_b", ".pvera_lambda_d": "lambda_d"},
    shared={"pvera_A": "a", "pvera_B": "b"},
    needed=("lambda_b", "lambda_d"),
    read=read,
    settings=vera.SETTINGS,
    free=("d_initial", "fan_in_fan_out", "generator_seed", "init_weights", "pvera_dropout"),
    refused={
        "sample_at_inference": "it draws other numbers for every token; false takes their mean, as PEFT's merge does"
    },
)
