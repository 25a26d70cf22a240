"""What llama.cpp was built for, and what it finds on this machine to compute on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from edgelora.engine.native import ggml_function, llama

_KINDS = ("CPU", "GPU", "integrated GPU", "accelerator", "meta")  # ggml_backend_dev_type, ggml/include/ggml-backend.h


@dataclass(frozen=True)
class Device:
    """One ggml device; memory in bytes, 0 where the backend does not say."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int


def devices() -> list[Device]:
    """The devices that llama.cpp can compute on, in its own order."""
    count = ggml_function("ggml_backend_dev_count", ctypes.c_size_t)()
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    return [_describe(get(index)) for index in range(count)]


def _describe(device: int) -> Device:
    name = ggml_function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)(device).decode()
    description = ggml_function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)(device).decode()
    kind = ggml_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)(device)
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    size_pointer = ctypes.POINTER(ctypes.c_size_t)
    memory = ggml_function("ggml_backend_dev_memory", None, ctypes.c_void_p, size_pointer, size_pointer)
    memory(device, ctypes.byref(free), ctypes.byref(total))
    return Device(name, description, _KINDS[kind] if kind < len(_KINDS) else f"type {kind}", free.value, total.value)


def backend_name() -> str:
    """`CPU`, or the kind of GPU that layers go to: `CUDA`, `Metal`, `Vulkan` ..."""
    gpus = [device.name.rstrip("0123456789") for device in devices() if "GPU" in device.kind]
    return gpus[0] if gpus else "CPU"


def system_info() -> list[str]:
    """The instruction sets and features that this build of llama.cpp uses."""
    text = llama().llama_print_system_info().decode()
    return [
        part.split("=")[0].strip().removeprefix("CPU :").strip()
        for part in text.split("|")
        if part.strip().endswith("= 1")
    ]
