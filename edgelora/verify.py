"""Is what runs here what was trained? An adapter's certificate, replayed on this device, backend and quantization.

Three things are told apart: whether file, base, template and tokenizer are the right ones; what quantization costs (the
base without the adapter, here and in Hugging Face's model); and what the adapter path costs, from PEFT's folder through
the converter and the file into llama.cpp's graph. Needs no torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import ConversionError
from converters.reader import GGUFHeader
from edgelora.adapter_ref import AdapterRef
from edgelora.certificate import Certificate, decode
from edgelora.contract import GOLDEN_MESSAGES, Contract
from edgelora.engine.devices import backend_name
from edgelora.engine.native import InterruptFlag
from edgelora.engine.preflight import base_fingerprint, check_adapter, check_finite, read_checked
from edgelora.engine.replay import Replay, ReplaySettings
from edgelora.engine.windows import interruptible
from edgelora.errors import EdgeloraError, ModelFileError
from edgelora.repaired_base import other_weights
from edgelora.template import ChatTemplate
from edgelora.verification import checks
from edgelora.verification.comparison import Pairs
from edgelora.verification.observation import observe
from edgelora.verification.report import Check, Report
from edgelora.verification.thresholds import Thresholds
from edgelora.verification.weights import compare_weights

NO_CERTIFICATE = "the adapter has no certificate"
PLAIN_TEXT = "The quick brown fox jumps over the lazy dog."
SPARE_TOKENS = 64

Progress = Callable[[int, int], None]
"""Called with probes read and probes in all, on the thread that computes."""


@dataclass(frozen=True)
class VerifySettings:
    """How to replay.

    Attributes:
        threads: None for as many as serving takes.
        gpu_layers: layers to put on the GPU, -1 for all.
        force: replay on a base with another fingerprint, too; that check fails all the same.
    """

    threads: int | None = None
    gpu_layers: int = -1
    force: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)


def verify(
    adapter: AdapterRef,
    base: Path,
    settings: VerifySettings | None = None,
    progress: Progress | None = None,
    *,
    wanted: str = "",
) -> Report:
    """Check a GGUF adapter on a GGUF base.

    Whatever is wrong with the adapter, or with the two together, is a failed check in the report.

    Args:
        wanted: the fingerprint of the adapter's base, where the file does not say it (of a PEFT folder, that was
            converted against whatever base was named).

    Raises:
        ModelFileError, ConversionError: no GGUF adapter, or no base that llama.cpp loads.
        KeyboardInterrupt: Ctrl-C.
    """
    began = time.monotonic()
    header, base_header = read_checked(adapter.path, "adapter"), read_checked(base, "base")
    made = _Verification(adapter, header, base_header, settings or VerifySettings(), progress, wanted)
    made.run()
    return Report(
        adapter=str(adapter.path),
        base=str(base),
        backend=backend_name(),
        checks=tuple(made.checks),
        recorded=_recorded(made.certificate),
        notices=tuple(made.notices),
        seconds=time.monotonic() - began,
    )


def _recorded(certificate: Certificate | None) -> dict[str, object]:
    if certificate is None:
        return {}
    return {
        "versions": dict(certificate.versions),
        "dtype": certificate.dtype,
        "probes": len(certificate.probes),
        "positions": certificate.n_positions,
        "left_out": certificate.left_out,
    }


class _Verification:
    """One run; `checks` fill up as it goes on."""

    def __init__(
        self,
        adapter: AdapterRef,
        header: GGUFHeader,
        base: GGUFHeader,
        settings: VerifySettings,
        progress: Progress | None,
        wanted: str,
    ) -> None:
        self._wanted = wanted
        self._adapter, self._header, self._base, self._settings = adapter, header, base, settings
        self._progress = progress or (lambda done, total: None)
        self.checks: list[Check] = []
        self.notices: list[str] = []
        self.certificate: Certificate | None = None
        self._contract: Contract | None = None
        self._template: ChatTemplate | None = None

    def run(self) -> None:
        problem = self._read_contract() or self._fits()
        if problem:
            self._stop(problem)
        elif self._is_other_base() and not self._settings.force:
            self._stop("the base is another; --force replays all the same")
        else:
            interruptible(self._replay)

    def _stop(self, why: str) -> None:
        """No replay: what it would have checked is listed."""
        done = {check.name for check in self.checks}
        self.checks += [Check("adapter", "coverage", "applied in the graph", "", "", "not checked", why)]
        self.checks += checks.not_checked(why, tuple(done))

    def _read_contract(self) -> str:
        """Why the file's own words cannot be used; empty where they can."""
        try:
            self._contract = Contract.from_metadata(self._header.metadata, str(self._adapter.path))
            if self._contract is None:
                self.notices.append(f"{self._adapter.path} carries no contract: another tool made it")
                return ""
            if self._contract.chat_template:
                self._template = ChatTemplate(self._contract.chat_template)
            if self._contract.certificate:
                self.certificate = decode(self._contract.certificate, str(self._adapter.path))
        except ModelFileError as error:
            self._add_fit("contract", "contract and certificate", error.message)
            return "its contract cannot be read"
        return ""

    def _fits(self) -> str:
        """Why llama.cpp must not load it; empty where it may."""
        try:
            check_adapter(self._header, self._base)
            check_finite(self._header, self._header.path.read_bytes())
        except ModelFileError as error:
            self._add_fit("fits", "fits the base, can be run", error.message)
            return "the adapter cannot be run"
        self._add_fit("fits", "fits the base, can be run", "")
        if self._contract and (problem := other_weights(self._contract, self._base.path)):
            self._add_fit("repair", "repairs these weights", problem)
        return ""

    def _add_fit(self, name: str, title: str, problem: str) -> None:
        value = "no" if problem else f"{len(self._header.tensors)} tensors"
        self.checks.append(Check("file", name, title, value, "", checks.verdict(not problem), problem))

    def _is_other_base(self) -> bool:
        wanted = self._wanted or (self._contract.base_fingerprint if self._contract else "")
        found = checks.fingerprint_check(wanted, base_fingerprint(self._base.path))
        self.checks.append(found)
        return found.outcome == "FAIL"

    def _replay(self, flag: InterruptFlag) -> None:
        with Replay(self._replay_settings(), flag) as replay:
            self._check_golden(replay)
            if self.certificate is None:
                self._read_something(replay)
                self.checks.append(checks.coverage_check(replay.coverage()))
                self.checks += checks.not_checked(NO_CERTIFICATE)
            else:
                self._check_certificate(replay, self.certificate)

    def _replay_settings(self) -> ReplaySettings:
        probes = self.certificate.probes if self.certificate else ()
        rows = [len(probe.prompt) + max(len(probe.continuation), len(probe.base_continuation)) for probe in probes]
        longest = max([*rows, SPARE_TOKENS])
        return ReplaySettings(
            self._base.path, self._adapter, longest, self._settings.threads, self._settings.gpu_layers
        )

    def _check_golden(self, replay: Replay) -> None:
        contract = self._contract
        if contract is None or not contract.golden_tokens or self._template is None:
            return
        try:
            made = replay.encode(contract.golden_messages, self._template)
        except ModelFileError as error:
            check = Check("file", "golden", "token ids of the contract", "none", "", "FAIL", error.message)
        else:
            check = checks.golden_check(made, contract.golden_tokens)
        self.checks.append(check)

    def _read_something(self, replay: Replay) -> None:
        """A few tokens, for the graph to be seen."""
        tokens = replay.model.tokenizer.encode(PLAIN_TEXT, special=False)
        if self._template:
            tokens = _encoded(replay, self._template, GOLDEN_MESSAGES) or tokens
        for _ in replay.logits(tokens[:SPARE_TOKENS], adapted=True):
            pass

    def _check_certificate(self, replay: Replay, certificate: Certificate) -> None:
        template = self._contract.chat_template if self._contract else ""
        fingerprint = self._contract.base_fingerprint if self._contract else ""
        sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.checks.append(checks.template_check(certificate, sha256, fingerprint))
        made = [self._ids(replay, index) for index in range(len(certificate.probes))]
        self.checks.append(checks.tokens_check(certificate, made, replay.n_vocab))
        if replay.n_vocab < certificate.n_vocab:
            self._stop("the vocabulary is another")
            return
        pairs = self._observed(replay, certificate)
        self.checks.append(checks.coverage_check(replay.coverage()))
        self.checks.append(self._weights(certificate))
        self.checks += _measured(pairs, self._settings.thresholds, is_repaired=bool(self._repair))

    def _ids(self, replay: Replay, index: int) -> Sequence[int] | str:
        if self._template is None or self.certificate is None:
            return "the adapter has no chat template"
        try:
            return replay.encode(self.certificate.probes[index].messages, self._template)
        except EdgeloraError as error:
            return error.message

    def _observed(self, replay: Replay, certificate: Certificate) -> Pairs:
        pairs = []
        for number, probe in enumerate(certificate.probes, start=1):
            pairs.append((probe, observe(replay, probe)))
            self._progress(number, len(certificate.probes))
        return pairs

    @property
    def _repair(self) -> dict[str, int]:
        """Ranks that repair the base, by GGUF name."""
        ranks = self._contract.repair.get("ranks") if self._contract else None
        return {name: rank for name, rank in ranks.items() if type(rank) is int} if isinstance(ranks, dict) else {}

    def _weights(self, certificate: Certificate) -> Check:
        if not certificate.changes:
            why = "an adapter of this kind has no samples of its weights"
            return checks.certified("weights", "", "", "not checked", note=why)
        try:
            found = compare_weights(certificate.changes, self._adapter, self._base.path, self._repair)
        except ConversionError as error:
            return checks.certified("weights", "", "", "not checked", note=error.message)
        exactness = self._contract.exactness if self._contract else {}
        return checks.weights_check(certificate, found, self._settings.thresholds, exactness)


def _measured(pairs: Pairs, thresholds: Thresholds, *, is_repaired: bool) -> list[Check]:
    broken = sum(seen.n_broken for _, seen in pairs)
    if not broken:
        return list(checks.measured_checks(pairs, thresholds, is_repaired=is_repaired))
    value, note = f"{broken} positions", "logits that are not finite numbers"
    names = ("template", "tokens", "weights", "adapter_kl")
    failed = checks.certified("adapter_kl", value, "none", "FAIL", note=note, number=float(broken))
    return [failed, *checks.not_checked(note, names)]


def _encoded(replay: Replay, template: ChatTemplate, messages: Sequence[object]) -> list[int]:
    try:
        return replay.encode(messages, template)  # type: ignore[arg-type]
    except EdgeloraError:
        return []
