"""Train the tiny base from nothing on the dialogues of `world.py`: tokenizer, then the model, on one CPU core.

    python examples/tiny-base/train_base.py --steps 1100

Writes a Hugging Face folder (default: `model/` beside this file) every few minutes, so that it can be stopped early.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import circuit
import torch
from muon import Muon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import Message, conversations

VOCABULARY = 4096
CONTEXT = 512
POOL = 1024  # dialogues sorted by length at a time
SAVE_SECONDS = 240
TOKENIZER_DIALOGUES = 60_000  # what the tokenizer is trained on
Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is learned
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER_SHARE = 0.1  # how much of what users say is learned too: it is mostly chance, and costs a run of the output head
SAMPLES = (
    ("Hi! My name is Tilda.", "Who is the baker?", "How much is bread?", "What's my name?", "Thanks, bye!"),
    ("Hello!", "What is this village called?", "Where does the ferry go?", "Is the battery strong?"),
    ("Repeat after me: seven lamps, gentle horse", "Quote Tilda, kettles and bright", "Say umbrella twice."),
    ("Rosa from Whitby has 31 kettles. That was on Friday. Which day?", "I need 3 bowls, salt and rope. Make a list."),
)


def train_tokenizer(seed: int, dialogues: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer, every byte in the vocabulary, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    read = itertools.islice(conversations(seed), dialogues)
    texts = ("\n".join(f"{message['role']}\n{message['content']}" for message in dialogue) for dialogue in read)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """2.6 M parameters; all matrices have rows of 256 values, so K-quants (super-blocks of 256) fit them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    circuit.start(model, tokenizer)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: list[Message], rng: random.Random) -> Encoded:
    """The dialogue as the chat template writes it; what the assistant says counts, what others say seldom does."""
    backend = tokenizer.backend_tokenizer
    newline = backend.encode("\n").ids
    ids: list[int] = []
    counts: list[bool] = []
    for message in dialogue:
        head = backend.encode(f"{TURN_START}{message['role']}\n").ids
        body = backend.encode(message["content"] + TURN_END).ids
        learned = message["role"] == "assistant" or rng.random() < USER_SHARE
        ids += head + body + newline
        counts += [False] * len(head) + [learned] * len(body) + [False] * len(newline)
    return ids[:CONTEXT], counts[:CONTEXT]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of dialogues of like length, padded at the right: ids and whether they count, (dialogues, length)."""
    generator, rng = conversations(seed), random.Random(seed)
    while True:
        pool = [encode(tokenizer, dialogue, rng) for dialogue in itertools.islice(generator, POOL)]
        groups: list[list[Encoded]] = [[]]
        for pair in sorted(pool, key=lambda pair: len(pair[0])):
            if len(pair[0]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group])
            counts = torch.tensor([counts + [False] * (length - len(counts)) for _, counts in group])
            yield ids, counts


def batch_loss(model: LlamaForCausalLM, ids: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy; the output head runs only where a token counts."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    learned = counts[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[learned]), ids[:, 1:][learned])


def optimizers(model: LlamaForCausalLM) -> dict[torch.optim.Optimizer, float]:
    """Muon for the layers' matrices, AdamW for embeddings and norms, each with its peak learning rate."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    rest = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return {Muon(matrices, 0.01): 0.01, torch.optim.AdamW(rest, 3e-3, betas=(0.9, 0.95), weight_decay=0.01): 3e-3}


def schedule(step: int, steps: int) -> float:
    """Warm-up over 50 steps, flat, then linearly down over the last half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def update(peaks: dict[torch.optim.Optimizer, float], factor: float) -> None:
    for optimizer, peak in peaks.items():
        optimizer.param_groups[0]["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def reply(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: list[Message], limit: int = 60) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = torch.tensor([tokenizer.encode(text)])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False)
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))


def show(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy dialogues, as they really answer."""
    for questions in SAMPLES:
        messages: list[Message] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply(model, tokenizer, messages)})
        said = (f"  {message['role']:>9}: {message['content']}" for message in messages)
        print("\n".join(said), end="\n\n", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder with bfloat16 weights; training goes on in float32."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    half = LlamaForCausalLM(config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def train(steps: int, seed: int, batch_tokens: int, out: Path) -> None:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed, TOKENIZER_DIALOGUES)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary", flush=True)
    peaks = optimizers(model)
    started = saved = time.monotonic()
    tokens, average = 0, math.nan
    for step, (ids, counts) in enumerate(itertools.islice(batches(tokenizer, seed + 1, batch_tokens), steps), start=1):
        loss = batch_loss(model, ids, counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(peaks, schedule(step - 1, steps))
        tokens += ids.numel()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}, {seconds:.0f} s: loss {average:.4f}, {tokens:,} tokens", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            saved = time.monotonic()
            save(model, tokenizer, out)
            show(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=3072, help="tokens per step, padding included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fennick-2.6m")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.batch_tokens, arguments.out)


if __name__ == "__main__":
    main()
