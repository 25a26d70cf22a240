"""The start of the training: a copying circuit, set by hand.

A transformer that starts at random learns to copy words from its context ("induction", arXiv:2209.11895) only after
far more text than one core reads in an hour. So the weights start close to a circuit that copies (in the spirit of
mimetic initialization, arXiv:2305.09828), and training does the rest:

- layer 0: two of the four key-value groups look at the previous token and write a part of it into a place of its own;
- layer 1: the same groups look for the token whose previous token is the current one, and write that token;
- all other heads write a little of whatever they look at, and the feed-forward layers start silent;
- `word` and ` word` (with the space before it) start as near neighbours, so that copying one favours the other.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HEAD = 32  # dimensions of a head; half as many rotary frequencies
CIRCUIT_GROUPS = 2  # of four key-value groups, each shared by two query heads
EMBEDDING, FINAL_NORM = (
    0.25,
    0.25,
)  # a wide embedding is heard in the residual stream; the small norm keeps logits small
POSITION, MATCH = 2.0, 3.0  # how sharply the heads of layer 0 and of layer 1 look
PREVIOUS, COPIED, HEARD = 0.2, 1.0, 0.2  # how loudly they write, and how loudly all other heads write
FAST, SLOW = 6, 5  # rotary pairs that tell neighbours apart; first pair that turns slowly enough to carry content


@torch.no_grad()
def start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the starting weights of a tied Llama with heads of 32 dimensions, two query heads to a key-value head."""
    embed(model.model.embed_tokens.weight, tokenizer)
    model.model.norm.weight.fill_(FINAL_NORM)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    width = model.config.hidden_size
    own, previous = orthogonal_rows(2 * CIRCUIT_GROUPS * HEAD, width).chunk(2)
    previous_token_heads(model.model.layers[0].self_attn, own, previous)
    for layer in model.model.layers[1:]:
        copying_heads(layer.self_attn, HEARD)
    induction_heads(model.model.layers[1].self_attn, own, previous)


def embed(weight: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random rows, alike for ` word` and `word`; the first column is one for all, for heads that ignore content."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(weight.shape[0])))
    stems = {stem: number for number, stem in enumerate(dict.fromkeys(token.removeprefix("Ġ") for token in tokens))}
    shared = torch.randn(len(stems), weight.shape[1])[[stems[token.removeprefix("Ġ")] for token in tokens]]
    weight.copy_(EMBEDDING * (0.8 * shared + 0.6 * torch.randn_like(weight)))
    weight[:, 0] = 4 * EMBEDDING


def orthogonal_rows(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


def rows_of(head: int) -> slice:
    return slice(head * HEAD, (head + 1) * HEAD)


def previous_token_heads(attention: torch.nn.Module, own: torch.Tensor, previous: torch.Tensor) -> None:
    """Query and key are constants one rotary step apart; the value moves from `own` to `previous` directions."""
    frequencies = 10000.0 ** (-torch.arange(FAST) / (HEAD // 2))
    query, key = torch.zeros(HEAD), torch.zeros(HEAD)
    query[:FAST] = POSITION
    key[:FAST], key[HEAD // 2 : HEAD // 2 + FAST] = POSITION * frequencies.cos(), POSITION * frequencies.sin()
    for group in range(CIRCUIT_GROUPS):
        attention.k_proj.weight[rows_of(group)] = 0
        attention.k_proj.weight[rows_of(group), 0] = key
        attention.v_proj.weight[rows_of(group)] = own[rows_of(group)]
        for head in (2 * group, 2 * group + 1):
            attention.q_proj.weight[rows_of(head)] = 0
            attention.q_proj.weight[rows_of(head), 0] = query
            attention.o_proj.weight[:, rows_of(head)] = PREVIOUS * previous[rows_of(group)].T


def copying_heads(attention: torch.nn.Module, loudness: float) -> None:
    """Every head writes what it reads, in the same directions."""
    attention.v_proj.weight.copy_(orthogonal_rows(*attention.v_proj.weight.shape))
    for head in range(attention.o_proj.weight.shape[1] // HEAD):
        attention.o_proj.weight[:, rows_of(head)] = loudness * attention.v_proj.weight[rows_of(head // 2)].T


def induction_heads(attention: torch.nn.Module, own: torch.Tensor, previous: torch.Tensor) -> None:
    """The query is the current token, the key what layer 0 wrote of the one before; fast rotary pairs stay out."""
    slow = MATCH * (torch.arange(HEAD) % (HEAD // 2) >= SLOW).float()[:, None]
    for group in range(CIRCUIT_GROUPS):
        attention.k_proj.weight[rows_of(group)] = slow * previous[rows_of(group)]
        for head in (2 * group, 2 * group + 1):
            attention.q_proj.weight[rows_of(head)] = slow * own[rows_of(group)]
            attention.o_proj.weight[:, rows_of(head)] = COPIED * attention.v_proj.weight[rows_of(group)].T
