"""Model and adapter files: Hugging Face folders and PEFT adapters to GGUF, and reading both.

Knows nothing of edgelora and needs neither torch nor llama_cpp: numpy, gguf and tokenizers, and for quantized types
the `libggml-base` that llama-cpp-python installs. `converters.reader` and `converters.errors` need nothing but Python.
"""
