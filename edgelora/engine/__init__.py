"""The engine: one base in memory, many adapters beside it, one thread that owns llama.cpp.

The only package that imports `llama_cpp`, and only its low-level half:

    native.py       the ctypes seam: log capture, handles freed once, the flag that interrupts a running decode
    amx.py          matrix tiles that fault, hidden from llama.cpp
    model.py        a loaded base: metadata, special tokens, sizes
    context.py      KV memory and decode
    tokenizer.py    text to tokens and back
    prompt.py       a conversation to the tokens that the model reads
    preflight.py    what is checked before llama.cpp sees an adapter
    adapters.py     which adapters there are, and which of them are in memory
    graph.py        nodes of a compute graph, as they lie in memory
    low_rank.py     an adapter's weights, as the mixing kernels read them
    mixing.py       different adapters in one decode; kernels/ is its C half
    mixing_proof.py that this model computes with them as llama.cpp does
    cache.py        KV prefixes, keyed by adapter content and scale; kv_files.py keeps them on disk
    fit.py          how much KV, of which type, and how many GPU layers fit
    sampler.py      sampler chains
    reply.py        token bytes to text: stop strings, whole characters
    grammar.py      what a grammar allows next
    planning.py     from a request to its adapters, tokens and rules; overflow.py makes it fit
    generation.py   one request at work, step by step
    scheduler.py    who is decoded next
    runtime.py      everything above, on the engine's own thread
    replay.py       every position's logits, with an adapter and without: what verify compares
    coverage.py     which of an adapter's tensors the graph computes with
    stream.py       what callers hold: Request, Stream, Completion
    engine.py       Engine: the thread and its queue
"""
