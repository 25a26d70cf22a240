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
    mixer.py        different adapters in one decode: what a mixer is, and the sockets that llama.cpp is given
    mixing_rows.py  by kernels of our own, on the CPU; kernels/ has the C
    mixing_stack.py by a stack with masks, on any backend
    mixing.py       which of the two; mixing_proof.py: that this model computes with it as llama.cpp does
    cache.py        KV prefixes, keyed by adapter content and scale; kv_files.py keeps them on disk
    fit.py          how much KV, of which type, and how many GPU layers fit
    embedding.py    vectors of texts, from bases made for it
    sampler.py      sampler chains
    reply.py        token bytes to text: stop strings, whole characters
    grammar.py      what a grammar allows next
    planning.py     from a request to its adapters, tokens and rules; overflow.py makes it fit
    generation.py   one request at work, step by step
    scheduler.py    who is decoded next
    runtime.py      everything above, on the engine's own thread
    replay.py       every position's logits, with an adapter and without: what verify compares
    scoring.py      how likely a reply is that is given: what eval and fit compare
    coverage.py     which of an adapter's tensors the graph computes with
    stream.py       what callers hold: Request, Stream, Completion
    engine.py       Engine: the thread and its queue
"""
