"""What the machine is and what it does: precision, speed, power and memory."""

import contextlib
import os
import platform
import statistics
import subprocess
import threading
from functools import lru_cache
from pathlib import Path

import torch

from blm_core.config import ConfigError

# Dense bfloat16 FLOP/s that the makers state. MFU is given for these only.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. Raises ConfigError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


@lru_cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; where it does not, they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _read("/proc/cpuinfo")
    return device.type == "cpu" and ("amx_bf16" in flags or "avx512_bf16" in flags)


def resolve_dtype(device: torch.device, dtype: str) -> str:
    """`dtype` itself, or for "auto" bfloat16 where it is fast and float32 elsewhere."""
    return dtype if dtype != "auto" else "bfloat16" if fast_bfloat16(device) else "float32"


def precision(device: torch.device, dtype: str):
    """Autocast to bfloat16 on `device`, or nothing for float32."""
    if resolve_dtype(device, dtype) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation of one device, None where the peak is not known."""
    name = device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return round(flops_per_second / peak, 4) if peak else None


def memory(device: torch.device) -> float | None:
    """Peak memory in GB (10^9 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    peak = [line.split()[1] for line in _read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return round(int(peak[0]) * 1024 / 1e9, 2) if peak else None


class PowerSampler:
    """Watts that a GPU draws while it works: nvidia-smi reads them in one process, a thread collects them."""

    def __init__(self, device: torch.device, milliseconds: int = 100):
        self._readings: list[float] = []
        self._process = None
        if device.type != "cuda":
            return
        visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), device.index or 0
        gpu = visible.split(",")[index].strip() if visible else index  # nvidia-smi counts all GPUs, PyTorch the visible ones
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--loop-ms={milliseconds}"]
        with contextlib.suppress(OSError):  # there is no nvidia-smi
            command = ["nvidia-smi", f"--id={gpu}", *query]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._thread = threading.Thread(target=self._collect, daemon=True)
            self._thread.start()

    def _collect(self) -> None:
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # as in "[N/A]"
                self._readings.append(float(line))

    def watts(self) -> float | None:
        """The mean since the last call, None where nothing was read."""
        readings, self._readings = self._readings, []
        return statistics.mean(readings) if readings else None

    def close(self) -> None:
        if self._process:
            self._process.terminate()
            self._thread.join()
            self._process.stdout.close()
            self._process.wait()


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""  # there is none but on Linux
