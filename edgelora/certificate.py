"""What an adapter said on the machine that trained it, for another machine to compare with.

A certificate holds probes: short prompts, with what Hugging Face's model made of them, with the adapter and without.

    messages            [{"role": "user", "content": "How long does the battery last?"}]
    prompt              the ids of these messages under the adapter's template     1 17 92 ... 8
    continuation        what the adapter answers, greedily                         73 318 11 2
    base_continuation   what the base answers, greedily
    positions           of prompt + continuation, those that are recorded          0 1 2 ... 19
    adapter, base       at each of them, the 64 likeliest next tokens: ids, and log-probabilities
    base_at             and the log-probabilities that the base gives those of the adapter

Beside them stand samples of what the adapter adds to each weight (`edgelora.change_samples`): next to a coarsely
quantized base, the text of a model that is a little wrong is not to be told from that of a sound one.

The text in the contract (`edgelora.certificate`) is base64 of zlib of this, little-endian:

    b"ELC1"  uint32 length of the header  the header, JSON: counts, messages, versions
    of each probe: prompt, continuation, base_continuation, positions; ids and codes of `adapter`, those of `base`,
    and the codes of `base_at`; at the end, float32, the samples of all changes

Arrays of ids are int32, and codes uint16, with the n-th bytes of all values together: the high ones are mostly zero.
A code is round(CODE_SCALE * sqrt(-log p)), fine where the probability is; ascending ones are kept as differences.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.change_samples import SAMPLES, ChangeSample
from edgelora.contract import MAX_CERTIFICATE
from edgelora.errors import ModelFileError
from edgelora.messages import Message, check_messages

MAX_PAYLOAD = 4 << 20
"""Bytes that may come out of zlib: a certificate of the largest text that is no trick has about 400,000."""
TOP = 64
MAGIC = b"ELC1"
MAX_VOCABULARY = MAX_WIDTH = 1 << 24
CODE_SCALE = 8192.0
MAX_CODE = 0xFFFF
FLOOR = -((MAX_CODE / CODE_SCALE) ** 2)
"""The lowest log-probability that a code holds, -64: what is less likely has it too."""
MAX_SUM = 1.01
"""What the probabilities of a row may add up to: rounding of the codes takes a row above 1 by less than 0.001."""
_SECTIONS = ("prompt", "continuation", "base_continuation", "positions")

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens at some positions, the likeliest first.

    Attributes:
        ids: int32 (n_positions, n_top).
        log_probs: float32 (n_positions, n_top), natural logarithms, not below `FLOOR`.
    """

    ids: Ints
    log_probs: Floats


@dataclass(frozen=True)
class Probe:
    """A prompt and what became of it; see the module's example.

    Attributes:
        positions: int32, ascending; 0 is the first token of the prompt, whose successor is predicted there.
        adapter, base: on the same tokens, `prompt + continuation`.
        base_at: float32, the shape of `adapter.ids`: the base's log-probabilities of the adapter's likeliest tokens.
    """

    messages: tuple[Message, ...]
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    base_continuation: tuple[int, ...]
    positions: Ints
    adapter: TopTokens
    base: TopTokens
    base_at: Floats

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.continuation


@dataclass(frozen=True)
class Certificate:
    """Probes, and under what they were recorded.

    Attributes:
        versions: of peft, transformers and torch.
        dtype: of the base's weights, "float32" or as in training.
        base_fingerprint: `converters.fingerprint` of the base.
        template_sha256: of the chat template's source, in hex.
        n_vocab: width of the logits.
        changes: samples of what is added to weights.
        n_unsampled: modules that the adapter changes and that have no sample.
        left_out: what did not fit, in words; empty where all did.
    """

    probes: tuple[Probe, ...]
    versions: Mapping[str, str]
    dtype: str
    base_fingerprint: str
    template_sha256: str
    n_vocab: int
    changes: tuple[ChangeSample, ...] = ()
    n_unsampled: int = 0
    left_out: str = ""

    @property
    def n_positions(self) -> int:
        return sum(len(probe.positions) for probe in self.probes)

    def encode(self) -> str:
        """The text for the contract; see the module."""
        head = {
            "versions": dict(self.versions),
            "dtype": self.dtype,
            "base_fingerprint": self.base_fingerprint,
            "template_sha256": self.template_sha256,
            "n_vocab": self.n_vocab,
            "left_out": self.left_out,
            "changes": [[change.tensor, *change.shape] for change in self.changes],
            "n_unsampled": self.n_unsampled,
            "probes": [_probe_header(probe) for probe in self.probes],
        }
        header = json.dumps(head, sort_keys=True).encode()
        arrays = b"".join(part for probe in self.probes for part in _probe_parts(probe))
        samples = b"".join(change.values.astype("<f4").tobytes() for change in self.changes)
        payload = MAGIC + struct.pack("<I", len(header)) + header + arrays + samples
        return base64.b64encode(zlib.compress(payload, 9)).decode("ascii")

    def within(self, max_text: int = MAX_CERTIFICATE) -> Certificate:
        """This one, cut down until its text has at most `max_text` characters, with `left_out` saying what went.

        Positions go first: each probe keeps at most so many, evenly spread over its tokens, as fit. Where even
        `MIN_POSITIONS` do not, the last probes go, too.

        Raises:
            ModelFileError: a single probe does not fit.
        """
        if len(self.encode()) <= max_text:
            return self
        for count in range(len(self.probes), 0, -1):
            if found := self._thinned(count, max_text):
                return found
        raise ModelFileError(
            f"no certificate of {max_text} characters: the first probe alone takes more", hint="Give shorter probes."
        )

    def _thinned(self, n_probes: int, max_text: int) -> Certificate | None:
        """The first probes with as many positions as fit; None where `MIN_POSITIONS` do not."""
        low, high = MIN_POSITIONS, max(len(probe.positions) for probe in self.probes)
        best = None
        while low <= high:
            middle = (low + high) // 2
            candidate = self._cut(n_probes, middle)
            if len(candidate.encode()) <= max_text:
                best, low = candidate, middle + 1
            else:
                high = middle - 1
        return best

    def _cut(self, n_probes: int, n_positions: int) -> Certificate:
        probes = tuple(_with_positions(probe, n_positions) for probe in self.probes[:n_probes])
        kept = sum(len(probe.positions) for probe in probes)
        said = [f"{self.n_positions - kept} of {self.n_positions} positions"]
        said += [f"{len(self.probes) - n_probes} of {len(self.probes)} probes"] if n_probes < len(self.probes) else []
        return replace(self, probes=probes, left_out=" and ".join(said))


MIN_POSITIONS = 4


def _with_positions(probe: Probe, count: int) -> Probe:
    """At most `count` of its positions, evenly spread, the last among them."""
    n = len(probe.positions)
    if n <= count:
        return probe
    kept = np.unique(np.round(np.linspace(n - 1, 0, count)).astype(np.int64))

    def rows(top: TopTokens) -> TopTokens:
        return TopTokens(top.ids[kept], top.log_probs[kept])

    return replace(
        probe,
        positions=probe.positions[kept],
        adapter=rows(probe.adapter),
        base=rows(probe.base),
        base_at=probe.base_at[kept],
    )


def _probe_header(probe: Probe) -> dict[str, Any]:
    return {
        "messages": list(probe.messages),
        "counts": [len(getattr(probe, name)) for name in _SECTIONS],
        "tops": [probe.adapter.ids.shape[1], probe.base.ids.shape[1]],
    }


def _probe_parts(probe: Probe) -> list[bytes]:
    lists = [_planes(np.asarray(getattr(probe, name), np.int32)) for name in _SECTIONS]
    tops = (part for top in (probe.adapter, probe.base) for part in (top.ids, _ascending(_codes(top.log_probs))))
    return [*lists, *map(_planes, tops), _planes(_codes(probe.base_at))]


def _planes(values: npt.NDArray[Any]) -> bytes:
    """All first bytes, then all second ones ..."""
    flat = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, values.dtype.itemsize).T.tobytes()


def _codes(log_probs: Floats) -> npt.NDArray[np.uint16]:
    codes = np.round(CODE_SCALE * np.sqrt(np.maximum(-log_probs.astype(np.float64), 0.0)))
    return np.minimum(codes, MAX_CODE).astype(np.uint16)


def _ascending(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    return np.diff(codes.astype(np.int64), axis=1, prepend=0).astype(np.uint16)


def _log_probs(codes: npt.NDArray[Any]) -> Floats:
    return (-((codes / CODE_SCALE) ** 2)).astype(np.float32)


def decode(text: str, source: str = "this adapter") -> Certificate:
    """The certificate in a contract's text. It may come from a stranger: every size is checked before it is used.

    Raises:
        ModelFileError: it is damaged, or of a version that this edgelora does not read.
    """
    try:
        return _Reader(_unpacked(text)).certificate()
    except (ValueError, TypeError, KeyError, RecursionError, struct.error, zlib.error, binascii.Error) as error:
        raise ModelFileError(
            f"{source}: its certificate is damaged: {error}",
            hint="Record it again: `edgelora convert ADAPTER --certify`, where the adapter was trained.",
        ) from None


def _unpacked(text: str) -> bytes:
    if not isinstance(text, str) or len(text) > MAX_CERTIFICATE:
        raise ValueError(f"more than {MAX_CERTIFICATE} characters")
    unpacker = zlib.decompressobj()
    payload = unpacker.decompress(base64.b64decode(text, validate=True), MAX_PAYLOAD)
    if not unpacker.eof:
        raise ValueError(f"it unpacks to more than {MAX_PAYLOAD} bytes, or ends early")
    if unpacker.unused_data:
        raise ValueError("bytes after its end")
    return payload


class _Reader:
    def __init__(self, payload: bytes) -> None:
        if payload[:4] != MAGIC:
            raise ValueError(f"it begins with {payload[:4]!r}, expected {MAGIC!r}")
        self._payload, self._at = payload, 4
        (length,) = struct.unpack("<I", self._take(4))
        self._header = _mapping(json.loads(self._take(length).decode("utf-8")))

    def certificate(self) -> Certificate:
        header = self._header
        n_vocab = _count(header["n_vocab"], 2, MAX_VOCABULARY)
        probes = tuple(self._probe(_mapping(entry), n_vocab) for entry in _list(header["probes"]))
        changes = tuple(self._change(_list(entry)) for entry in _list(header["changes"]))
        if not probes or self._at != len(self._payload):
            raise ValueError("no probes" if not probes else f"{len(self._payload) - self._at} bytes too many")
        versions = {_text(name): _text(value) for name, value in _mapping(header["versions"]).items()}
        texts = {name: _text(header[name]) for name in ("dtype", "base_fingerprint", "template_sha256", "left_out")}
        n_unsampled = _count(header["n_unsampled"], 0, MAX_VOCABULARY)
        return Certificate(probes, versions, n_vocab=n_vocab, changes=changes, n_unsampled=n_unsampled, **texts)

    def _change(self, entry: list[Any]) -> ChangeSample:
        tensor, n_outputs, n_inputs = entry
        shape = _count(n_outputs, 1, MAX_WIDTH), _count(n_inputs, 1, MAX_WIDTH)
        values = np.frombuffer(self._take(4 * SAMPLES**2), "<f4").reshape(SAMPLES, SAMPLES).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"a sample of {_text(tensor)[:80]} that is not finite")
        return ChangeSample(_text(tensor), shape, values)

    def _take(self, count: int) -> bytes:
        if count > len(self._payload) - self._at:
            raise ValueError(f"it ends early: {count} bytes wanted, {len(self._payload) - self._at} there")
        self._at += count
        return self._payload[self._at - count : self._at]

    def _array(self, dtype: str, *shape: int) -> npt.NDArray[Any]:
        size, width = int(np.prod(shape)), np.dtype(dtype).itemsize
        planes = np.frombuffer(self._take(size * width), np.uint8).reshape(width, size)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)

    def _probe(self, entry: Mapping[str, Any], n_vocab: int) -> Probe:
        messages = _messages(entry["messages"])
        counts = [_count(value, 0, len(self._payload)) for value in _list(entry["counts"])]
        tops = [_count(value, 1, TOP) for value in _list(entry["tops"])]
        if len(counts) != len(_SECTIONS) or len(tops) != 2:
            raise ValueError(f"a probe with {len(counts)} counts and {len(tops)} tops")
        *lists, positions = (self._array("<i4", count) for count in counts)
        for ids in lists:
            _check_ids(ids, n_vocab)
        prompt, continuation, base_continuation = (tuple(map(int, ids)) for ids in lists)
        _check_positions(prompt, positions, len(prompt) + len(continuation))
        adapter, base = (self._top(len(positions), top, n_vocab) for top in tops)
        base_at = _log_probs(self._array("<u2", *adapter.ids.shape))
        return Probe(messages, prompt, continuation, base_continuation, positions, adapter, base, base_at)

    def _top(self, n_positions: int, n_top: int, n_vocab: int) -> TopTokens:
        ids = self._array("<i4", n_positions, n_top)
        _check_ids(ids, n_vocab)
        if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
            raise ValueError("a token twice at one position")
        codes = np.cumsum(self._array("<u2", n_positions, n_top), axis=1, dtype=np.int64)
        if codes.size and codes.max() > MAX_CODE:
            raise ValueError(f"a log-probability's code is {codes.max()}, at most {MAX_CODE} is one")
        log_probs = _log_probs(codes)
        if codes.size and np.exp(log_probs, dtype=np.float64).sum(axis=1).max() > MAX_SUM:
            raise ValueError("probabilities that add up to more than 1")
        return TopTokens(ids, log_probs)


def _check_ids(ids: Ints, n_vocab: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        raise ValueError(f"a token id of {ids.min() if ids.min() < 0 else ids.max()}, of {n_vocab} tokens")


def _check_positions(prompt: Sequence[int], positions: Ints, n_tokens: int) -> None:
    if not prompt or not len(positions):
        raise ValueError("a probe without tokens")
    if positions[0] < 0 or positions[-1] >= n_tokens or (np.diff(positions) <= 0).any():
        raise ValueError(f"positions that are not ascending, or not among {n_tokens} tokens")


def _count(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"a count of {str(value)[:40]}, expected {low} to {high}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__}, expected text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__}, expected a list")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__}, expected an object")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if problem := check_messages(value):
        raise ValueError(problem)
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
