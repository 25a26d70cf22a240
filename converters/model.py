"""A model folder understood: which family it is, its sizes and vocabulary, and where each of its tensors goes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.architectures import Config, Family, Place, Sizes, find_family
from converters.architectures.settings import complete, flatten, problems_of
from converters.checkpoint import READABLE, Checkpoint, Floats
from converters.errors import FormatError, UnsupportedError, listed
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.view import View, scales_of

if TYPE_CHECKING:
    from converters.tokenizer import Vocabulary

COMPARED_BYTES = 4 << 20
UNTIED = (
    "config.json ties the output to the embeddings, but the output's weights differ from them: they are kept as an "
    "output of their own, as transformers does"
)
# What multimodal checkpoints hold beside the text model (`TextModel.filter_tensors`, conversion/base.py).
OTHER_PARTS = re.compile(
    r"(?:^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|multimodal_projector|mm_projector|embed_vision|"
    r"embed_audio|image_newline|connector)(?:\.|$)"
)
# Classes whose code was published beside the weights before transformers had it. Others keep their name and change
# what they compute, so they are refused.
PUBLISHED_WITH_CODE = frozenset((
    "PhiForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM", "RWForCausalLM", "StableLmForCausalLM",
    "StableLMEpochForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM",
    "Glm4ForCausalLM", "GPTNeoXForCausalLM",
))  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A checkpoint understood.

    Attributes:
        config: complete: see `architectures.settings.complete`.
        metadata: the hyperparameters under their GGUF keys.
        views: GGUF name to the tensor to be made, for all that come from the checkpoint.
        tied_to: the HF tensor that stands for the output, "" where there is an output of its own.
    """

    family: Family
    config: Config
    sizes: Sizes
    metadata: Mapping[str, Any]
    views: Mapping[str, View]
    tied_to: str
    own_notices: tuple[str, ...]
    load_vocabulary: Callable[[], Vocabulary]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read when it is first asked for: an adapter's conversion does without.

        Raises:
            ConversionError: see `tokenizer.load_vocabulary`.
        """
        return self.load_vocabulary()

    @property
    def notices(self) -> tuple[str, ...]:
        return (*self.own_notices, *self.vocabulary.notices)


def understand(checkpoint: Checkpoint) -> Model:
    """Match a model folder with its family; every problem is in one message.

    Raises:
        UnsupportedError: configuration or tensors that this family cannot take.
        FormatError: tensors that are missing or have a shape that config.json contradicts.
    """
    folder, flat = checkpoint.folder, flatten(checkpoint.config)
    family = find_family(flat, folder)
    names, left_out = _renamed(checkpoint, family, flat)
    config = complete(flat, family, family.extra_layers(checkpoint.tensors))
    problems, remote = problems_of(config, flat, family), _remote_code(flat)
    if problems or (remote and flat["architectures"][0] not in PUBLISHED_WITH_CODE):
        refused = [f"the model is code of its own ({remote}), which is not run"] if remote else []
        raise UnsupportedError(f"{folder / 'config.json'}: cannot be converted exactly:{listed([*problems, *refused])}")
    checkpoint.rename(names)
    metadata = {f"{family.architecture}.{key}": value for key, value in family.hyperparameters(config).items()}
    sizes = Sizes(family.architecture, config["vocab_size"], metadata)
    views, tied_to, untied = _views(checkpoint, family, sizes, config)
    vocabulary = partial(_vocabulary, checkpoint, family, config)
    notices = [*checkpoint.notices, *family.notices(config), *_left_out(left_out)]
    notices += [UNTIED] if untied else []
    if remote:
        notices.append(f"config.json names code of its own ({remote}), which was not run: read as transformers' own")
    return Model(family, config, sizes, metadata, views, tied_to, tuple(notices), vocabulary)


def _vocabulary(checkpoint: Checkpoint, family: Family, config: Config) -> Vocabulary:
    from converters.tokenizer import load_vocabulary  # takes a third of an adapter's conversion, which needs none
    from converters.tokenizer_ends import end_tokens

    found = load_vocabulary(checkpoint.tokenizer_folder, config["vocab_size"], family.tokenizer, config)
    if checkpoint.tokenizer_folder == checkpoint.folder:
        return found
    ends = end_tokens(checkpoint.folder, found.metadata, len(found.tokens))  # the model still ends its replies so
    return replace(found, metadata={**found.metadata, **ends})


def _remote_code(config: Config) -> str:
    classes = config.get("auto_map")
    return str(classes.get("AutoModelForCausalLM") or "") if isinstance(classes, dict) else ""


def _renamed(checkpoint: Checkpoint, family: Family, config: Config) -> tuple[dict[str, str], list[str]]:
    """Stored names to those of the family's rows, and the tensors of parts that are not the text model."""
    found, left_out = {}, []
    is_multimodal = isinstance(checkpoint.config.get("text_config"), dict)
    has_prefix = any(name.startswith(family.prefix) for name in checkpoint.tensors)
    for stored in checkpoint.tensors:
        if is_multimodal and OTHER_PARTS.search(stored):
            left_out.append(stored)
            continue
        name = stored.replace("language_model.", "") if is_multimodal else stored
        name = family.rename(name, config)
        if not has_prefix and not name.startswith((family.prefix, "lm_head.", "embed_out.")):
            name = family.prefix + name  # a checkpoint of the bare model
        found[stored] = name
    return found, left_out


def _left_out(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    parts = Counter(match[1] for name in names if (match := OTHER_PARTS.search(name)))
    shown = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
    return [f"the text model is converted; left out: {shown}"]


def _views(checkpoint: Checkpoint, family: Family, sizes: Sizes, config: Config) -> tuple[dict[str, View], str, bool]:
    """GGUF name to tensor; what the output is tied to; whether it was to be tied and is not.

    An output that differs from the embeddings is a weight of its own, whatever config.json says: transformers does
    not tie it either (`tie_weights`, modeling_utils.py).
    """
    ways: dict[str, list[Place]] = {}
    for place in family.places(sizes, config):
        ways.setdefault(place.gguf_name, []).append(place)
    embedding = ways[EMBEDDING][0].hf_names(sizes)[0]
    output = ways.get(OUTPUT, [None])[0]
    tied = config.get("tie_word_embeddings", False) if output is None or output.row.absent_if_tied else False
    own = output.hf_names(sizes)[0] if output else "lm_head.weight"
    has_own = own in checkpoint.tensors and not (tied and _is_copy(checkpoint, own, embedding))
    problems, used, numbers, views = [], set(), set(), {}
    if has_own and output is None:
        problems.append(f"{own}: differs from {embedding}, and llama.cpp's {family.architecture} ties the two")
    used |= {own} if own in checkpoint.tensors and not has_own else set()
    for gguf_name, places in ways.items():
        if gguf_name == OUTPUT and tied and not has_own:
            continue
        place = next((place for place in places if _stored(place, sizes)[0] in checkpoint.tensors), places[0])
        needed = _stored(place, sizes)
        if not place.is_needed and needed[0] not in checkpoint.tensors:
            continue
        used |= set(needed)
        numbers |= set() if place.row.mxfp4 else set(needed) & set(checkpoint.tensors)
        missing = [name for name in needed if name not in checkpoint.tensors]
        wrong = [f"{name}: is missing" for name in missing] or _shape_problems(checkpoint, place, sizes)
        if wrong:  # and no sizes to be trusted: row orders of them might not fit in memory
            problems += wrong
        else:
            views[gguf_name] = View.of(checkpoint, place, sizes)
    ignored = re.compile("|".join(family.ignored))
    problems += [
        f"{name}: no tensor of a {family.architecture} model with this config.json"
        for name in checkpoint.tensors
        if name not in used and not ignored.fullmatch(name) and not checkpoint.is_idle_bias(name)
    ]
    if problems:
        raise FormatError(f"{checkpoint.folder}: its tensors do not fit its config.json:{listed(problems)}")
    checkpoint.check_dtypes(sorted(numbers))
    return views, "" if has_own or not tied else embedding, bool(has_own and tied)


def _stored(place: Place, sizes: Sizes) -> tuple[str, ...]:
    """Every HF tensor of a place, the exponents of MXFP4 blocks among them."""
    names = place.hf_names(sizes)
    return (*names, *map(scales_of, names)) if place.row.mxfp4 else names


def _shape_problems(checkpoint: Checkpoint, place: Place, sizes: Sizes) -> list[str]:
    if place.row.mxfp4:
        return _mxfp4_problems(checkpoint, place, sizes)
    wanted = place.hf_shape(sizes)
    return [
        f"{name}: has shape {checkpoint.tensors[name].shape}, config.json gives {wanted}"
        for name in place.hf_names(sizes)
        if checkpoint.tensors[name].shape != wanted
    ]


def _mxfp4_problems(checkpoint: Checkpoint, place: Place, sizes: Sizes) -> list[str]:
    """Blocks are (experts, rows, groups of 32 values, 16 bytes); exponents the same without the last."""
    blocks = place.hf_names(sizes)[0]
    *outer, columns = place.hf_shape(sizes)
    groups = (*outer, columns // 32)
    return [
        f"{name}: has shape {tensor.shape} and dtype {tensor.dtype}, config.json gives {wanted} and U8"
        for name, wanted in ((blocks, (*groups, 16)), (scales_of(blocks), groups))
        if (tensor := checkpoint.tensors[name]).shape != wanted or tensor.dtype not in ("U8", "F8_E8M0")
    ]


def _is_copy(checkpoint: Checkpoint, name: str, other: str) -> bool:
    one, two = checkpoint.tensors[name], checkpoint.tensors.get(other)
    if two is None or one.shape != two.shape or one.dtype not in READABLE or two.dtype not in READABLE:
        return two is None  # the embedding is missed by its own name
    rows = one.shape[0] if one.shape else 0
    step = max(1, COMPARED_BYTES // (4 * max(1, one.shape[-1] if one.shape else 1)))
    return all(
        np.array_equal(
            checkpoint.rows(name, start, min(rows, start + step)).view(np.uint32),
            checkpoint.rows(other, start, min(rows, start + step)).view(np.uint32),
        )
        for start in range(0, rows, step)
    )


def norms(model: Model) -> Iterator[tuple[str, Floats]]:
    """GGUF name and values of every norm."""
    for name, view in model.views.items():
        if name.endswith("_norm.weight"):
            yield name, view.read_all().reshape(-1)
