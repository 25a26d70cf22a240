"""Adapters that repair a quantization beside what they were trained for, as `edgelora fit` tries them.

The same ranks as those of `edgelora convert ADAPTER --base BASE --repair-rank N` (`edgelora.repair`); here the rows
tell whether they help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_ref import AdapterRef
from edgelora.contract import Contract
from edgelora.errors import SettingsError
from edgelora.repair import write_repaired
from edgelora.store import Store

if TYPE_CHECKING:
    from converters.imatrix import ImportanceMatrix
    from converters.writer import TensorSpec


@dataclass(frozen=True)
class Repairs:
    """Repairs of one base's quantizations.

    Attributes:
        ranks: to be tried on each.
        reference: the base's folder.
        adapter: a GGUF adapter.
        contract: its own.
        dtype: of its tensors.
        imatrix: how strongly the base's columns are used; None where nobody measured it.
    """

    ranks: tuple[int, ...]
    reference: Path
    adapter: AdapterRef
    contract: Contract
    dtype: str
    imatrix: ImportanceMatrix | None

    def sizes(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[int, int]]:
        """Ranks, and the bytes that each adds to the adapter; none where nothing is quantized.

        Args:
            specs: the base's tensors.
        """
        from converters.repair import planned_bytes

        sizes = ((rank, planned_bytes(specs, rank, self.dtype)) for rank in self.ranks)
        return ((rank, size) for rank, size in sizes if size)

    def write(self, base: Path, rank: int, out: Path) -> AdapterRef:
        """The adapter, repairing one quantization.

        Raises:
            ConversionError: the ranks cannot be found or stored.
        """
        from converters.repair import find_repair

        repair = find_repair(base, self.reference, rank, self.imatrix)
        write_repaired(self.adapter.path, base, repair, self.contract, out, self.dtype)
        return replace(self.adapter, path=out)


def plan_repairs(
    ranks: Sequence[int], base: Path, adapter: AdapterRef | None, imatrix: ImportanceMatrix | None, *, force: bool
) -> Repairs | None:
    """What `--repair-ranks` asks for; None where it is not given.

    Args:
        adapter: as GGUF.

    Raises:
        SettingsError: there is nothing to repair with, or to compare with.
        BaseMismatchError: the adapter was made for another base, and `force` is not given.
    """
    from converters.adapter import AdapterOptions
    from converters.adapter_file import DTYPES
    from converters.reader import read_header
    from edgelora.adapter_contract import ContractTerms, against
    from edgelora.entry import quantization_of

    if not ranks:
        return None
    header = read_header(adapter.path) if adapter else None
    contract = (Contract.from_metadata(header.metadata, str(header.path)) if header else None) or Contract()
    problems = [*_problems(base, adapter, contract)]
    if problems or adapter is None or header is None:
        raise SettingsError("--repair-ranks: " + "; ".join(problems))
    settled = against(contract, adapter.path, base, Store(), ContractTerms(force=force))
    dtype = quantization_of(header)
    dtype = dtype if dtype in DTYPES else AdapterOptions.dtype
    return Repairs(tuple(dict.fromkeys(ranks)), base, adapter, settled.contract, dtype, imatrix)


def _problems(base: Path, adapter: AdapterRef | None, contract: Contract) -> Iterator[str]:
    if not base.is_dir():
        yield f"{base} is a GGUF file; what quantization takes is told from the model's folder: name that with --base"
    if adapter is None:
        yield "there is no adapter whose ranks they could stand beside: name one with --adapter"
    elif adapter.scale != 1.0:
        yield f"the scale of adapter {adapter.name}, {adapter.scale:g}, would be that of its repair, too: leave it out"
    if contract.repair:
        yield f"{adapter.path if adapter else 'the adapter'} repairs a base already: give it as it was trained"
