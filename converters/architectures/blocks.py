"""Rows that many families share: the parts of a decoder as transformers names them under `model.layers`."""

from __future__ import annotations

from converters.architectures.family import Config, Indices, Order, Present, Row, Value, part_of_each
from converters.architectures.sizes import Sizes

LAYER, BLK = "model.layers.{layer}", "blk.{layer}"


def embeddings(*, bias: bool = False, output_bias: bool = False, norm_value: Value | None = None) -> tuple[Row, ...]:
    """Token embedding, last norm and output."""
    return (
        Row("model.embed_tokens", "token_embd", ("vocab", "embedding")),
        Row("model.norm", "output_norm", ("embedding",), bias=bias, value=norm_value),
        Row("lm_head", "output", ("vocab", "embedding"), absent_if_tied=True, bias=output_bias),
    )


def norm(hf: str, gguf: str, *, size: str = "embedding", bias: bool = False, value: Value | None = None,
         when: Present | None = None) -> Row:  # fmt: skip
    return Row(f"{LAYER}.{hf}", f"{BLK}.{gguf}", (size,), bias=bias, value=value, when=when)


def attention(
    *,
    bias: bool | str = False,
    output_bias: bool | str = False,
    q_order: Order | None = None,
    k_order: Order | None = None,
    output: str = "o_proj",
    when: Present | None = None,
) -> tuple[Row, ...]:
    """q, k, v and output as matrices of their own."""
    prefix = f"{LAYER}.self_attn"
    return (
        Row(f"{prefix}.q_proj", f"{BLK}.attn_q", ("q_rows", "embedding"), rows=q_order, bias=bias, when=when),
        Row(f"{prefix}.k_proj", f"{BLK}.attn_k", ("kv_rows", "embedding"), rows=k_order, bias=bias, when=when),
        Row(f"{prefix}.v_proj", f"{BLK}.attn_v", ("v_rows", "embedding"), bias=bias, when=when),
        Row(f"{prefix}.{output}", f"{BLK}.attn_output", ("embedding", "o_columns"), bias=output_bias, when=when),
    )


def head_norms(*, value: Value | None = None, when: Present | None = None, q: tuple[str, ...] = ("head_dim",),
               k: tuple[str, ...] = ("head_dim",)) -> tuple[Row, ...]:  # fmt: skip
    """Norms of the heads of q and k."""
    prefix = f"{LAYER}.self_attn"
    return (
        Row(f"{prefix}.q_norm", f"{BLK}.attn_q_norm", q, value=value, when=when),
        Row(f"{prefix}.k_norm", f"{BLK}.attn_k_norm", k, value=value, when=when),
    )


def gated_mlp(*, bias: bool | str = False, when: Present | None = None) -> tuple[Row, ...]:
    """gate, up and down as matrices of their own."""
    return (
        Row(f"{LAYER}.mlp.gate_proj", f"{BLK}.ffn_gate", ("feed_forward", "embedding"), bias=bias, when=when),
        Row(f"{LAYER}.mlp.up_proj", f"{BLK}.ffn_up", ("feed_forward", "embedding"), bias=bias, when=when),
        Row(f"{LAYER}.mlp.down_proj", f"{BLK}.ffn_down", ("embedding", "feed_forward"), bias=bias, when=when),
    )


def fused_mlp() -> tuple[Row, ...]:
    """gate and up as one matrix, which llama.cpp takes as it is."""
    return (
        Row(f"{LAYER}.mlp.gate_up_proj", f"{BLK}.ffn_up", ("two_feed_forward", "embedding")),
        Row(f"{LAYER}.mlp.down_proj", f"{BLK}.ffn_down", ("embedding", "feed_forward")),
    )


def experts(
    *,
    hf: str = "mlp",
    router: str = "gate",
    each: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    when: Present | None = None,
) -> tuple[Row, ...]:
    """Experts, which checkpoints hold one by one, or all of a layer in two tensors."""
    prefix = f"{LAYER}.{hf}"
    wide, tall = ("experts", "expert_feed_forward", "embedding"), ("experts", "embedding", "expert_feed_forward")
    fused = ("experts", "two_expert_feed_forward", "embedding")
    bare = ("", ".weight")
    gate, up, down = (f"{prefix}.experts.{{each}}.{name}" for name in each)
    return (
        Row(f"{prefix}.{router}", f"{BLK}.ffn_gate_inp", ("experts", "embedding"), when=when),
        Row(gate, f"{BLK}.ffn_gate_exps", wide, each="experts", when=when),
        Row(up, f"{BLK}.ffn_up_exps", wide, each="experts", when=when),
        Row(down, f"{BLK}.ffn_down_exps", tall, each="experts", when=when),
        Row(f"{prefix}.experts.gate_up_proj", f"{BLK}.ffn_gate_exps", wide, rows=first_halves, hf_shape=fused,
            ends=bare, when=when),
        Row(f"{prefix}.experts.gate_up_proj", f"{BLK}.ffn_up_exps", wide, rows=second_halves, hf_shape=fused,
            ends=bare, when=when),
        Row(f"{prefix}.experts.down_proj", f"{BLK}.ffn_down_exps", tall, ends=bare, when=when),
    )  # fmt: skip


def first_halves(sizes: Sizes) -> Indices:
    rows = sizes["expert_feed_forward"]
    return part_of_each(sizes["experts"], 2 * rows, 0, rows)


def second_halves(sizes: Sizes) -> Indices:
    rows = sizes["expert_feed_forward"]
    return part_of_each(sizes["experts"], 2 * rows, rows, 2 * rows)


def shared_expert(when: Present | None = None) -> tuple[Row, ...]:
    """The expert that every token passes (Qwen's)."""
    prefix = f"{LAYER}.mlp.shared_expert"
    return (
        Row(f"{prefix}.gate_proj", f"{BLK}.ffn_gate_shexp", ("shared_feed_forward", "embedding"), when=when),
        Row(f"{prefix}.up_proj", f"{BLK}.ffn_up_shexp", ("shared_feed_forward", "embedding"), when=when),
        Row(f"{prefix}.down_proj", f"{BLK}.ffn_down_shexp", ("embedding", "shared_feed_forward"), when=when),
        Row(f"{prefix}_gate", f"{BLK}.ffn_gate_inp_shexp", (1, "embedding"), when=when),
    )


def where(key: str, *values: object) -> Present:
    """Present where a configuration key is true, or has one of the values."""

    def present(config: Config, layer: int | None) -> bool:
        return config.get(key) in values if values else bool(config.get(key))

    return present
