"""The tokens with a meaning, whether they are added, and chat templates, as llama.cpp's converter finds them.

It looks at four files, tokenizer.json, tokenizer_config.json, config.json and the chat template files, by rules of its
own (`SpecialVocab`, gguf-py/gguf/vocab.py of llama.cpp 0c1e57098; the `gguf` package on PyPI is older than that).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from converters.checkpoint import read_json
from converters.errors import FormatError
from converters.writer import Value

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ID_KEYS: Mapping[str, str] = {  # kinds without a key here have none in a GGUF file
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # spelled so
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
ADD_KEYS: Mapping[str, str] = {kind: f"tokenizer.ggml.add_{kind}_token" for kind in ("bos", "eos", "sep")}
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
LOWERCASE = "tokenizer.ggml.normalizer.lowercase"
STRIP_ACCENTS = "tokenizer.ggml.normalizer.strip_accents"
Json = Mapping[str, Any]


@dataclass
class SpecialTokens:
    """What was found.

    Attributes:
        ids: kind ("bos", "eot" ...) to token id.
        adds: kind to whether the tokenizer puts that token at its place.
        template: a chat template, or several with names.
        flags: keys about letter case and accents.
    """

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    template: str | Sequence[Json] | None = None
    flags: dict[str, Value] = field(default_factory=dict)

    def metadata(self) -> dict[str, Value]:
        """The `tokenizer.*` keys."""
        found: dict[str, Value] = {ID_KEYS[kind]: number for kind, number in self.ids.items() if kind in ID_KEYS}
        found |= {ADD_KEYS[kind]: adds for kind, adds in self.adds.items() if kind in ADD_KEYS}
        return {**found, **template_keys(self.template), **self.flags}


def read_special(
    folder: Path, tokenizer: Json, *, n_vocab: int | None = None, kinds: Sequence[str] = KINDS
) -> SpecialTokens:
    """Read the files of a model folder.

    Args:
        tokenizer: tokenizer.json, or empty.
        n_vocab: ids from here on are left out.
        kinds: which tokens to look for.

    Raises:
        FormatError: a file whose parts are not what they should be.
    """
    config, model = (
        read_json(path) if (path := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json")
    )
    try:
        reader = _Reader(dict(config), tuple(kinds))
        if tokenizer:
            reader.read_tokenizer(tokenizer)
        if config:
            reader.read_config(tokenizer.get("added_tokens") or [])
            reader.found.template = _template(folder, config)
        reader.read_model_config(model)
        ids = {kind: number for kind, number in reader.candidates if n_vocab is None or number < n_vocab}
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise FormatError(f"{folder}: its tokenizer files cannot be understood ({error})") from None
    reader.found.ids = ids
    try:
        template_keys(reader.found.template)
    except FormatError as error:
        raise FormatError(f"{folder}: {error.message}") from None
    return reader.found


class _Reader:
    """One reading; `config` is a copy, because a template in tokenizer.json can rename bos and eos in it."""

    def __init__(self, config: dict[str, Any], kinds: tuple[str, ...]) -> None:
        self.config, self.kinds = config, kinds
        self.has_config = bool(config)
        self.found = SpecialTokens()
        self._candidates: list[tuple[str, int]] = []

    @property
    def candidates(self) -> Iterable[tuple[str, int]]:
        """Kinds and ids, the deciding one last."""
        return reversed(self._candidates)

    def read_tokenizer(self, tokenizer: Json) -> None:
        self._flags(tokenizer.get("normalizer") or {})
        self.named = {kind: self.config.get(f"{kind}_token") for kind in KINDS}
        for kind, other in (("bos", "cls"), ("eos", "sep")):
            if not self.named[kind] and self.named[other]:
                self._rename(kind, self.named[other])
        processor = tokenizer.get("post_processor") or {}
        for part in processor.get("processors", [processor]):
            handle = {
                "ByteLevel": self._byte_level,
                "RobertaProcessing": self._roberta,
                "TemplateProcessing": self._template_processing,
            }.get(part.get("type"))  # fmt: skip
            if handle:
                handle(part)

    def read_config(self, added: Sequence[Json]) -> None:
        """tokenizer_config.json; `added` are the tokens of tokenizer.json, the first of a text counts."""
        number_of = {token.get("content"): token.get("id") for token in reversed(added)}
        for kind in self.kinds:
            adds, entry = self.config.get(f"add_{kind}_token"), self.config.get(f"{kind}_token")
            if isinstance(adds, bool):
                self.found.adds.setdefault(kind, adds)
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str):
                self._candidate(kind, number_of.get(text))

    def read_model_config(self, model: Json) -> None:
        inner = model.get("text_config") or {}
        for kind in self.kinds:
            number = model.get(f"{kind}_token_id")
            self._candidate(kind, inner.get(f"{kind}_token_id") if number is None else number)

    def _candidate(self, kind: str, number: Any) -> None:
        if type(number) is int:
            if number < 0:
                raise ValueError(f"{kind}_token_id is {number}")
            self._candidates.append((kind, number))

    def _flags(self, normalizer: Json) -> None:
        match normalizer.get("type"):
            case "Lowercase":
                self.found.flags[LOWERCASE] = True
            case "StripAccents":
                self.found.flags[STRIP_ACCENTS] = True
            case "BertNormalizer":
                for name, key in (("lowercase", LOWERCASE), ("strip_accents", STRIP_ACCENTS)):
                    if isinstance(normalizer.get(name), bool):
                        self.found.flags[key] = normalizer[name]
            case "Sequence":
                for part in normalizer.get("normalizers", []):
                    self._flags(part)

    def _rename(self, kind: str, text: Any) -> None:
        self.named[kind] = text
        if self.has_config:
            self.config[f"{kind}_token"] = text

    def _byte_level(self, part: Json) -> None:
        self.found.adds = {"bos": False, "eos": False, **self.found.adds}

    def _roberta(self, part: Json) -> None:
        self.found.adds |= {"bos": True, "eos": True, "sep": True}
        for kind, other in (("cls", "bos"), ("sep", "eos")):
            if not self.named[kind] and self.has_config:
                self._rename(kind, part.get(kind, [self.named[other]])[0])

    def _template_processing(self, part: Json) -> None:
        single, pair = part.get("single", []), part.get("pair", [])
        first = last = None
        if len(single) > 1:
            first, last = _special(single[0]), _special(single[-1])
            if first:
                self._first(first)
            if last:
                self._last(last)
        self._separator(pair, first, last)

    def _first(self, text: str) -> None:
        if not self.has_config:
            self.named["bos"] = text
        elif text not in (self.named["bos"], self.named["cls"]):
            for kind in ("bos", "cls"):
                if not self.named[kind]:
                    self._rename(kind, text)
        self.found.adds["bos"] = text in (self.named["bos"], self.named["cls"])

    def _last(self, text: str) -> None:
        if not self.has_config:
            self.named["eos"] = text
        elif text != self.named["eos"]:
            spare = next((kind for kind in ("eot", "eom") if kind not in self.kinds), None)
            if spare:
                self.kinds = (*self.kinds, spare)
                self.config[f"{spare}_token"] = self.named["eos"]
            self._rename("eos", text)
        self.found.adds["eos"] = text == self.named["eos"]

    def _separator(self, pair: Sequence[Json], first: str | None, last: str | None) -> None:
        start = 1 if pair and first and _special(pair[0]) == first else 0
        stop = -1 if pair and last and _special(pair[-1]) == last else None
        inner = list(pair)[start:stop]
        ends = [inner[place].get("Sequence", {}).get("id") for place in (0, -1)] if inner else []
        between = inner[1:-1]
        if ends != ["A", "B"] or not between:
            return
        known = (self.named["sep"], self.named["eos"])
        adds = bool(_special(between[0])) and _special(between[0]) in known and not last
        if len(between) == 2 and _special(between[1]):
            adds = adds or _special(between[1]) in known
        self.found.adds["sep"] = adds
        if adds and not self.named["sep"] and self.has_config:
            self.config["sep_token"] = self.named["eos"]


def _special(item: Json) -> str | None:
    return item.get("SpecialToken", {}).get("id")  # type: ignore[no-any-return]


def _template(folder: Path, config: Json) -> str | Sequence[Json] | None:
    """The chat template of tokenizer_config.json, or else of chat_template.jinja and its neighbours."""
    template: Any = config.get("chat_template", template_of_files(folder))
    return template if isinstance(template, (str, list)) else None


def template_of_files(folder: Path) -> str | Sequence[Json] | None:
    """`chat_template.jinja`, with its neighbours where there are more, or the older `chat_template.json`."""
    main, others = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if main.is_file():
        if not others:
            return _text(main)
        named = [{"name": path.stem, "template": _text(path)} for path in others]
        return [{"name": "default", "template": _text(main)}, *named]
    path = folder / "chat_template.json"
    return read_json(path).get("chat_template") if path.is_file() else None


def chat_template_of(folder: Path) -> str:
    """The chat template that a base made of this folder will have; "" for none.

    Raises:
        FormatError: it is not one.
    """
    path = folder / "tokenizer_config.json"
    template = _template(folder, read_json(path) if path.is_file() else {})
    found = template_keys(template).get(TEMPLATE, "")
    return found if isinstance(found, str) else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text ({error})") from None


def template_keys(template: str | Sequence[Json] | None) -> dict[str, Value]:
    """The keys for one template or several; of those, only the one named "default" is where programs look.

    Raises:
        FormatError: a list of other things than names and templates.
    """
    if template is None:
        return {}
    if isinstance(template, str):
        return {TEMPLATE: template}
    found: dict[str, str] = {}
    for choice in template:
        name, text = (choice.get("name"), choice.get("template")) if isinstance(choice, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise FormatError(f"chat_template: expected a list of names and templates, it has {str(choice)[:80]!r}")
        found["".join(c if c in ascii_letters + digits else "_" for c in name)] = text
    found.pop("", None)
    default = found.pop("default", None)
    keys: dict[str, Value] = {f"{TEMPLATE}.{name}": text for name, text in found.items()}
    if found:
        keys[TEMPLATES] = sorted(found)
    return {**keys, **({TEMPLATE: default} if default is not None else {})}
