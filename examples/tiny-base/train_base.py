"""Train the tiny base from nothing on the dialogues of `world.py`: tokenizer, then the model, on one CPU core.

    python examples/tiny-base/train_base.py --steps 1300

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

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from world import Message, conversations

VOCABULARY = 4096
CONTEXT = 512
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER_SHARE = 0.1  # how much of what users say is learned too: it is mostly chance, and costs a run of the output head
SAMPLES = (
    ("Hi! My name is Tilda.", "Who is the baker?", "Does she have a pet?", "How much is bread?", "What's my name?", "Thanks, bye!"),
    ("Hello!", "What is this village called?", "Where does the ferry go?", "Is the battery strong?"),
    ("Repeat after me: seven lamps, gentle horse", "Quote Tilda, kettles and bright", 'Rosa from Whitby has 31 kettles. That was on Friday. Which day?', "Say umbrella twice."),
)  # fmt: skip


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
    texts = ("\n".join(message["role"] + "\n" + message["content"] for message in dialogue) for dialogue in conversations(seed))
    tokenizer.train_from_iterator(itertools.islice(texts, dialogues), trainer)
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
    """2.6 M parameters; every matrix row is a multiple of 256 wide, so K-quants (super-blocks of 256) fit all of them."""
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
    initialize(model)
    return model


def initialize(model: LlamaForCausalLM) -> None:
    """Let the embedding be heard in the residual stream: wide embeddings, layers that add nothing at first.

    The last norm starts small, so that the tied output head starts with small logits all the same.
    """
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.25)
    torch.nn.init.constant_(model.model.norm.weight, 0.1)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: list[Message], rng: random.Random) -> tuple[list[int], list[float]]:
    """Token ids of the whole dialogue as the chat template writes it, and the loss weight of each token."""
    backend = tokenizer.backend_tokenizer
    newline = backend.encode("\n").ids
    ids: list[int] = []
    weights: list[float] = []
    for message in dialogue:
        head = backend.encode(f"{TURN_START}{message['role']}\n").ids
        body = backend.encode(message["content"] + TURN_END).ids
        weight = 1.0 if message["role"] == "assistant" or rng.random() < USER_SHARE else 0.0
        ids += head + body + newline
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(newline)
    return ids[:CONTEXT], weights[:CONTEXT]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of dialogues of like length, padded at the right: ids and weights, both (dialogues, length)."""
    generator, rng = conversations(seed), random.Random(seed)
    while True:
        pool = sorted((encode(tokenizer, dialogue, rng) for dialogue in itertools.islice(generator, 1024)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in pool:
            if len(pair[0]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group])
            weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in group])
            yield ids, weights


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; the output head runs only where a token counts."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    losses = functional.cross_entropy(model.lm_head(hidden[counts]), ids[:, 1:][counts], reduction="none")
    chosen = weights[:, 1:][counts]
    return (losses * chosen).sum() / chosen.sum()


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (https://kellerjordan.github.io/posts/muon), in float32.

    `torch.optim.Muon` does the steps in bfloat16, which is slow on a CPU.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = self.orthogonal(parameter.grad.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * 0.01)
                parameter.add_(update, alpha=-group["lr"] * max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5)

    @staticmethod
    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if tall else x


def optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for embeddings and norms, each with its peak learning rate."""
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name]
    rest = [parameter for name, parameter in model.named_parameters() if parameter.ndim != 2 or "embed" in name]
    return [(Muon(matrices, 0.02), 0.02), (torch.optim.AdamW(rest, 3e-3, betas=(0.9, 0.95), weight_decay=0.01), 3e-3)]


def schedule(step: int, steps: int) -> float:
    """Warm-up over 50 steps, flat, then linearly down over the last half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


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
        print("\n".join(f"  {message['role']:>9}: {message['content']}" for message in messages), end="\n\n", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder with bfloat16 weights; training goes on in float32."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    half = LlamaForCausalLM(config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=False
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(steps: int, seed: int, batch_tokens: int, out: Path) -> None:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed, dialogues=60_000)
    model = new_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer):,} tokens in the vocabulary", flush=True)
    pairs = optimizers(model)
    started = saved = time.monotonic()
    tokens, average = 0, math.nan
    for step, (ids, weights) in enumerate(itertools.islice(batches(tokenizer, seed + 1, batch_tokens), steps)):
        loss = batch_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in pairs:
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step:5}  {seconds:6.0f} s  loss {average:.4f}  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s", flush=True)
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            save(model, tokenizer, out)
            show(model, tokenizer)
    save(model, tokenizer, out)
    print(f"final: loss {average:.4f}, {steps} steps, {tokens:,} tokens, {time.monotonic() - started:.0f} s")
    show(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=3072, help="tokens per step, padding included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.batch_tokens, arguments.out)


if __name__ == "__main__":
    main()
