"""What a result depends on, and costs, besides its inputs: libraries, device, memory."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "diffusers", "transformers")
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # of x86 and ARM


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide on the last digits of a result."""
    return {name: version(name) for name in LIBRARIES}


def check_device(device: str) -> None:
    """Raise ValueError naming the key if this machine has no such device."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "device: cuda, but PyTorch finds no GPU here: set `device: cpu`, or install a driver and a "
                "PyTorch built for it"
            )


def has_bf16(device: str) -> bool:
    """Whether a device ("cpu" or "cuda") multiplies bfloat16 itself; elsewhere it is slower than float32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS)


def processor(device: str) -> str:
    """What the GPU, or the CPU, calls itself."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def forked(workers: int) -> dict[str, Any]:
    """A DataLoader's arguments for so many worker processes, which share this one's memory.

    Since Python 3.14 they would otherwise be begun anew, each with a copy of memory-mapped records.
    """
    return {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}


def peak_memory() -> int:
    """The most resident memory, in bytes, that this process has had; GPU memory is not in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_memory() -> int:
    """The most memory, in bytes, that tensors of this process have held on its GPU; 0 if it has used none."""
    import torch

    return torch.cuda.max_memory_allocated()
