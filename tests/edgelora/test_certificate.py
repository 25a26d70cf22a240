"""A certificate survives the way through its text and a contract; one from a stranger does no harm."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora.certificate import FLOOR, MAX_PAYLOAD, TOP, Certificate, Probe, TopTokens, decode
from edgelora.change_samples import SAMPLES, ChangeSample, inputs_of, sample
from edgelora.contract import MAX_CERTIFICATE, Contract
from edgelora.errors import ModelFileError

VOCABULARY = 5000
# A code's rounding moves sqrt(-log p) by at most 2**-14, and so -log p by at most 2 * 8 * 2**-14, at -64.
CODE_TOLERANCE = 1e-3


def top_tokens(rng: np.random.Generator, n_positions: int) -> TopTokens:
    logits = rng.normal(0, 4, (n_positions, VOCABULARY))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1)[:, :TOP]
    return TopTokens(ids.astype(np.int32), np.take_along_axis(log_probs, ids, 1).astype(np.float32))


def made(n_probes: int = 2, n_prompt: int = 5, n_answer: int = 7) -> Certificate:
    rng = np.random.default_rng(0)
    n_positions = n_prompt + n_answer
    probes = tuple(
        Probe(
            messages=({"role": "user", "content": f"é {number}"},),
            prompt=tuple(range(n_prompt)),
            continuation=tuple(range(n_answer)),
            base_continuation=(3,),
            positions=np.arange(n_positions, dtype=np.int32),
            adapter=top_tokens(rng, n_positions),
            base=top_tokens(rng, n_positions),
            base_at=rng.uniform(-20, 0, (n_positions, TOP)).astype(np.float32),
        )
        for number in range(n_probes)
    )
    change = ChangeSample("model.layers.0.q_proj.weight", (6, 4), np.ones((SAMPLES, SAMPLES), np.float32))
    return Certificate(probes, {"peft": "1"}, "float32", "ab" * 32, "cd" * 32, VOCABULARY, (change,), 3)


def assert_same(found: Certificate, wanted: Certificate) -> None:
    plain = {"probes": (), "changes": ()}
    assert replace(found, **plain) == replace(wanted, **plain)  # type: ignore[arg-type]
    for one, other in zip(found.probes, wanted.probes, strict=True):
        for name in ("messages", "prompt", "continuation", "base_continuation"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.positions == other.positions).all()
        assert np.abs(one.base_at - other.base_at).max() < CODE_TOLERANCE
        for a, b in ((one.adapter, other.adapter), (one.base, other.base)):
            assert (a.ids == b.ids).all()
            assert np.abs(a.log_probs - b.log_probs).max() < CODE_TOLERANCE
    for one_change, other_change in zip(found.changes, wanted.changes, strict=True):
        assert (one_change.tensor, one_change.shape) == (other_change.tensor, other_change.shape)
        assert (one_change.values == other_change.values).all()


def test_through_a_contract(tmp_path: Path) -> None:
    certificate = made()
    contract = Contract(certificate=certificate.encode())
    contract.save(tmp_path)
    for loaded in (Contract.load(tmp_path), Contract.from_metadata(contract.to_metadata())):
        assert loaded is not None
        assert_same(decode(loaded.certificate), certificate)


def test_the_least_likely_tokens_are_held_as_the_floor() -> None:
    probe = made(1).probes[0]
    far = replace(probe, base_at=np.full_like(probe.base_at, -200.0))
    assert decode(replace(made(), probes=(far,)).encode()).probes[0].base_at == pytest.approx(FLOOR)


def test_small_probabilities_keep_their_digits() -> None:
    """-log p of 1e-4 is the difference between 0.9999 and 1: what KL is made of where a model is sure."""
    probe = made(1).probes[0]
    sure = replace(probe, base_at=np.full_like(probe.base_at, -1e-4))
    found = decode(replace(made(), probes=(sure,)).encode()).probes[0].base_at
    assert found == pytest.approx(-1e-4, rel=0.02)


def test_positions_go_before_probes_and_both_are_said() -> None:
    whole = made(8, 40, 60)
    assert len(whole.encode()) > 200_000
    thinner = whole.within(150_000)
    assert len(thinner.probes) == 8
    assert len(thinner.encode()) <= 150_000
    assert thinner.left_out == f"{800 - thinner.n_positions} of 800 positions"
    assert all(probe.positions[-1] == 99 for probe in thinner.probes)
    fewer = whole.within(9_000)
    assert 0 < len(fewer.probes) < 8
    assert fewer.left_out.endswith(f"and {8 - len(fewer.probes)} of 8 probes")
    assert_same(decode(fewer.encode()), fewer)
    with pytest.raises(ModelFileError, match="first probe alone"):
        whole.within(1_000)


def test_one_that_fits_is_not_touched() -> None:
    whole = made()
    assert whole.within() is whole


def test_a_contract_takes_no_longer_text() -> None:
    with pytest.raises(ModelFileError, match="its contract is damaged"):
        Contract.from_metadata({"edgelora.contract.version": 1, "edgelora.certificate": "A" * (MAX_CERTIFICATE + 1)})


def packed(payload: bytes) -> str:
    return base64.b64encode(zlib.compress(payload)).decode()


def payload_of(certificate: Certificate, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Its payload with a changed header."""
    payload = zlib.decompress(base64.b64decode(certificate.encode()))
    (length,) = struct.unpack("<I", payload[4:8])
    header = json.loads(payload[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return payload[:4] + struct.pack("<I", len(text)) + text + payload[8 + length :]


def test_an_unchanged_header_is_read() -> None:
    """The twin of the next tests: what they break is what they say."""
    assert_same(decode(packed(payload_of(made(), lambda header: None))), made())


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "too many tokens": (lambda h: h["probes"][0]["counts"].__setitem__(0, 2**40), "a count of"),
    "negative": (lambda h: h["probes"][0]["counts"].__setitem__(0, -1), "a count of"),
    "a true count": (lambda h: h["probes"][0]["counts"].__setitem__(0, True), "a count of"),
    "not a number": (lambda h: h.__setitem__("n_vocab", float("nan")), "a count of"),
    "small vocabulary": (lambda h: h.__setitem__("n_vocab", 100), "a token id of"),
    "a longer row": (lambda h: h["probes"][0]["counts"].__setitem__(3, 13), "damaged"),
    "a shorter row": (lambda h: h["probes"][0]["counts"].__setitem__(0, 1), "damaged"),
    "wide tops": (lambda h: h["probes"][0]["tops"].__setitem__(0, 10**9), "a count of"),
    "no probes": (lambda h: h.__setitem__("probes", []), "no probes"),
    "probes of text": (lambda h: h.__setitem__("probes", "x"), "expected a list"),
    "messages": (lambda h: h["probes"][0].__setitem__("messages", [{"role": "king", "content": ""}]), "role 'king'"),
    "a wide weight": (lambda h: h["changes"][0].__setitem__(1, 2**60), "a count of"),
    "another change": (lambda h: h["changes"].append(["x", 1, 1]), "ends early"),
    "no changes": (lambda h: h.__setitem__("changes", []), "bytes too many"),
    "missing": (lambda h: h.pop("dtype"), "dtype"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str) -> None:
    change, words = HEADERS[name]
    with pytest.raises(ModelFileError, match=words):
        decode(packed(payload_of(made(), change)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("not base64!", "damaged"),
        (base64.b64encode(b"no zlib").decode(), "damaged"),
        (made().encode()[:-400], "damaged"),
        (packed(b"ELC9" + bytes(100)), "begins with b'ELC9'"),
        (packed(b"ELC1" + struct.pack("<I", 2**31)), "ends early"),
        (packed(b"ELC1" + struct.pack("<I", 100_000) + b"[" * 100_000), "damaged"),
        (packed(bytes(MAX_PAYLOAD + 1)), "unpacks to more"),
        (packed(bytes(150 << 20)), "unpacks to more"),  # 150 MB in 200 KB
        (base64.b64encode(zlib.compress(b"ELC1") + b"more").decode(), "damaged"),
        ("A" * (MAX_CERTIFICATE + 4), "more than"),
    ],
)
def test_a_text_that_is_no_certificate_is_refused(text: str, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        decode(text)


def with_probe(**changes: Any) -> Certificate:
    return replace(made(1), probes=(replace(made(1).probes[0], **changes),))


TWICE = np.zeros((12, TOP), np.int32)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (with_probe(prompt=(0, VOCABULARY)), "a token id of 5000"),
        (with_probe(prompt=(-1, 2)), "a token id of -1"),
        (with_probe(positions=np.zeros(12, np.int32)), "not ascending"),
        (with_probe(positions=np.arange(1, 13, dtype=np.int32)), "not among 12 tokens"),
        (with_probe(adapter=TopTokens(TWICE, made(1).probes[0].adapter.log_probs)), "a token twice"),
        (
            with_probe(adapter=TopTokens(made(1).probes[0].adapter.ids, np.zeros((12, TOP), np.float32))),
            "add up to more than 1",
        ),
        (
            replace(made(1), changes=(ChangeSample("q", (1, 1), np.full((SAMPLES, SAMPLES), np.nan, np.float32)),)),
            "not finite",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(broken: Certificate, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        decode(broken.encode())


def test_bits_flipped_anywhere_end_in_an_error_or_a_certificate() -> None:
    payload = payload_of(made(1), lambda header: None)
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(payload), 300):
        flipped = bytearray(payload)
        flipped[position] ^= 1 << int(rng.integers(0, 8))
        try:
            decode(packed(bytes(flipped)))
        except ModelFileError:
            continue


def test_samples_of_a_change_are_the_same_on_every_machine() -> None:
    """Signs come from SHAKE-128 of the name; these are what certificates in the world were made with."""
    assert inputs_of("w", 6)[:2].tolist() == EXPECTED_SIGNS
    change = np.arange(12.0).reshape(3, 4)
    found = sample("w", inputs_of("w", 4) @ change.T)
    assert found.shape == (SAMPLES, SAMPLES)
    assert sample("w", inputs_of("w", 4) @ (2 * change).T) == pytest.approx(2 * found)
    assert not np.allclose(sample("w", inputs_of("w", 4) @ change[[1, 0, 2]].T), found)
    assert not np.allclose(sample("v", inputs_of("v", 4) @ change.T), found)


EXPECTED_SIGNS = [[-1, -1, -1, 1, 1, -1], [-1, -1, -1, -1, -1, -1]]
