"""What a reply under a grammar may go on with. Nothing enters llama.cpp's grammar that it would refuse: it would end
the process.
"""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.engine.tokenizer import Decoder, Tokenizer
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`, llama.h."""
Candidates = npt.NDArray[np.void]
MAX_SECONDS = 2.0
"""A grammar with ever more ways to read the reply takes ever longer for a token; here it is given up."""


def apply(sampler: Any, candidates: Candidates) -> Any:
    """Let a llama.cpp sampler work on `candidates` (n,); gives the `llama_token_data_array`, maybe shorter."""
    library = llama()
    data = candidates.ctypes.data_as(ctypes.POINTER(library.llama_token_data))
    array = library.llama_token_data_array(data, len(candidates), -1, False)
    library.llama_sampler_apply(sampler, ctypes.byref(array))
    return array


def written(vocab: Any, token: int) -> bytes:
    """What llama.cpp writes for a token, control tokens with their text."""
    for size in (64, 1 << 16):
        buffer = ctypes.create_string_buffer(size)
        length: int = llama().llama_token_to_piece(vocab, token, buffer, size, 0, True)
        if length >= 0:
            return buffer.raw[:length]
    return b""


class GrammarDecoder(Decoder):
    """Tokens to the very bytes that the grammar takes them for: no space is stripped, whatever the tokenizer says.

    Args:
        markers: control tokens that are text too.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Collection[str] = ()) -> None:
        self._vocab = tokenizer.vocab
        self._silent = {token.id for text, token in tokenizer.control_tokens.items() if text not in markers}

    def bytes_of(self, token: int) -> bytes:
        return b"" if token in self._silent else written(self._vocab, token)


class Grammar:
    """Follows one reply through a grammar. Close it after use.

    Args:
        text: GBNF in which `edgelora.gbnf.problems` finds nothing.
        ends: tokens that end the reply: they may come once the grammar is satisfied.
        markers: control tokens that may come where the grammar has their text.
        frees_controls: the others may come where the grammar is satisfied, which does not see them: in the free parts
            of a reply.

    Raises:
        SettingsError: llama.cpp refuses it all the same.
        ModelFileError: the base has no token that ends a reply.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Tokenizer,
        ends: Collection[int],
        markers: Collection[str] = (),
        *,
        frees_controls: bool = False,
    ) -> None:
        library, vocab = llama(), tokenizer.vocab
        self._native_ends = {token for token in tokenizer.end_tokens if library.llama_vocab_is_eog(vocab, token)}
        if not self._native_ends:
            raise ModelFileError("this base has no token that ends a reply, so that no reply can follow a grammar")
        self._ends = (set(ends) | tokenizer.end_tokens) - self._native_ends
        # llama.cpp takes control tokens for their text, which is no part of a reply but for the markers.
        controls = {token.id for text, token in tokenizer.control_tokens.items() if text not in markers}
        self._silent = controls - self._native_ends - self._ends
        self._unseen = self._ends | self._silent if frees_controls else self._ends
        self._at_satisfied = np.array(sorted(self._unseen), np.int64)
        self._masked = np.array(sorted(self._silent | self._ends), np.int64)
        forget_log()
        pointer = library.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not pointer:
            raise SettingsError(f"llama.cpp refuses the grammar: {reason()}")
        self._handle = Handle(pointer, library.llama_sampler_free)
        self._characters = codecs.getincrementaldecoder("utf-8")()
        self._bytes_of = GrammarDecoder(tokenizer, markers).bytes_of

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        if token in self._unseen:
            return self.is_satisfied()
        return token not in self._silent and self.is_text(token) and self._takes(token)

    def is_text(self, token: int) -> bool:
        """Whether the reply is UTF-8 with `token`, up to a character that has begun: llama.cpp does not look."""
        data, state = self._bytes_of(token), self._characters.getstate()
        if data.isascii() and not state[0]:
            return True
        try:
            self._characters.decode(data)
        except UnicodeDecodeError:
            return False
        else:
            begun = self._characters.getstate()[0]
            return begun[:1] != b"\xed" or begun[1:] < b"\xa0"  # half of a pair: Python waits for its last byte
        finally:
            self._characters.setstate(state)

    def is_satisfied(self) -> bool:
        """Whether the reply may end here."""
        return self._takes(next(iter(self._native_ends)))

    def restrict(self, candidates: Candidates) -> Candidates:
        """Those of all tokens, in the order of their ids, that the grammar takes; of each, ask `is_text` too."""
        kept = candidates["logit"][self._at_satisfied]
        candidates["logit"][self._masked] = -np.inf
        self._apply(candidates)
        if self.is_satisfied():
            candidates["logit"][self._at_satisfied] = kept
        return candidates[candidates["logit"] > -np.inf]

    def accept(self, token: int) -> None:
        """Go on with a token that it allows.

        Raises:
            EdgeloraError: the grammar took too long.
        """
        if token not in self._unseen and token not in self._native_ends:
            self._characters.decode(self._bytes_of(token))
            began = time.perf_counter()
            llama().llama_sampler_accept(self._handle.pointer, token)
            self._check_time(began)

    def close(self) -> None:
        self._handle.close()

    def _takes(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], CANDIDATE)
        self._apply(one)
        return bool(one["logit"][0] > -np.inf)

    def _apply(self, candidates: Candidates) -> None:
        began = time.perf_counter()
        apply(self._handle.pointer, candidates)
        self._check_time(began)

    def _check_time(self, began: float) -> None:
        seconds = time.perf_counter() - began
        if seconds > MAX_SECONDS:
            raise EdgeloraError(
                f"the grammar took {seconds:.0f} s for one token: it can be read in too many ways",
                hint="Write it so that each text fits in one way only.",
            )
