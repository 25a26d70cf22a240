"""Methods of PEFT that are no change of the base's weights, and why."""

from __future__ import annotations

from collections.abc import Mapping

from converters.methods.method import Method

_TOKENS = "it puts trained vectors before the text, which no file of weights can hold"
_CACHE = "it puts trained keys and values before the text, in every layer, which no file of weights can hold"

REFUSED: Mapping[str, Method] = {
    "ADAMSS": Method(
        "AdaMSS",
        refusal="which outputs each of its parts changes is not stored: PEFT clusters the base's weights anew when it "
        "loads one, from random numbers of the device; merge it with PEFT where it was trained, and convert the result",
    ),
    "ADAPTION_PROMPT": Method(
        "Adaption prompt (LLaMA-Adapter)",
        "arXiv:2303.16199",
        refusal="it adds attention to trained vectors beside the base's own, in every layer",
    ),
    "CARTRIDGE": Method("Cartridge", "arXiv:2506.06266", refusal=_CACHE),
    "CPT": Method("Context-aware prompt tuning", "arXiv:2410.17222", refusal=_TOKENS),
    "LILY": Method(
        "Lily",
        "arXiv:2407.09946",
        refusal="a router mixes its matrices anew for every input, by all tokens that are computed together",
    ),
    "MULTITASK_PROMPT_TUNING": Method("Multitask prompt tuning", "arXiv:2303.02861", refusal=_TOKENS),
    "POLY": Method(
        "Poly", "arXiv:2202.13914", refusal="which of its skills apply is told with each request (task_ids)"
    ),
    "PREFIX_TUNING": Method("Prefix tuning", "arXiv:2101.00190", refusal=_CACHE),
    "PROMPT_TUNING": Method("Prompt tuning", "arXiv:2104.08691", refusal=_TOKENS),
    "P_TUNING": Method("P-tuning", "arXiv:2103.10385", refusal=_TOKENS),
    "SHADOW": Method("ShadowPEFT", refusal="a second network runs beside the base and changes what its layers see"),
    "XLORA": Method(
        "X-LoRA",
        "arXiv:2402.07148",
        refusal="a classifier weighs its adapters anew for every token, by the hidden states",
    ),
}
