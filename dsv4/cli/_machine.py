"""What this machine is: processors, memory, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dsv4
from dsv4.errors import ConfigError

PACKAGES = ("torch", "transformers", "safetensors", "triton", "nvidia-cutlass-dsl", "vllm")


def versions() -> dict[str, str | None]:
    """Installed versions, None for what is not installed. Read from metadata: nothing is imported."""
    return {"dsv4": dsv4.__version__, "python": platform.python_version()} | {
        package: _version(package) for package in PACKAGES
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_memory() -> int | None:
    """Bytes of main memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def devices() -> list[dict[str, Any]]:
    """The CPU, then every CUDA device."""
    cpu = {
        "device": "cpu",
        "name": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": cpu_memory(),
    }
    return [cpu, *(_cuda_device(index) for index in range(torch.cuda.device_count()))]


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def storage_bytes(module: torch.nn.Module) -> int:
    """What a module's parameters take, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


def torch_device(name: str | None) -> torch.device:
    """The device called ``name``, by default CUDA where there is one.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name or default_device())
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
