"""What the machine is and what it does: precision, speed, power and memory."""

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import time
from functools import lru_cache
from pathlib import Path

import torch

# Dense bfloat16 FLOP/s that the makers state. MFU is given for these only.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


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


def power(device: torch.device) -> float | None:
    """Watts that the GPU draws now, None where there is no GPU or no nvidia-smi."""
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def memory(device: torch.device) -> float | None:
    """Peak memory in GB (10^9 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    peak = [line.split()[1] for line in _read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return round(int(peak[0]) * 1024 / 1e9, 2) if peak else None


def reset_memory(device: torch.device) -> None:
    """Let the peak that `memory` tells begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class EnergyMeter:
    """Joules between `start` and `stop`: of the processor by RAPL counters, of the GPU by the power that nvidia-smi names.

    What cannot be read is None, and `why` says why.
    """

    def __init__(self, device: str = "cpu", powercap: Path = Path("/sys/class/powercap"), nvidia_smi: str = "nvidia-smi"):
        self.why: dict[str, str] = {}
        self._packages = [
            folder for folder in sorted(Path(powercap).glob("*-rapl:*")) if folder.name.count(":") == 1
        ]  # cores and memory below a package (name:0:1) are part of it
        if not self._packages:
            self.why["cpu"] = f"{powercap} has no RAPL counters"
        self._smi = shutil.which(nvidia_smi) if torch.device(device).type == "cuda" else None
        if not self._smi:
            self.why["gpu"] = "no GPU was used" if torch.device(device).type != "cuda" else f"{nvidia_smi} is not installed"
        self._gpu = torch.device(device).index or 0
        self._sampler: subprocess.Popen | None = None

    def start(self) -> None:
        if self._smi:
            query = [f"--id={self._gpu}", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "50"]
            self._sampler = subprocess.Popen([self._smi, *query], stdout=subprocess.PIPE, text=True)
        self._before = self._counters()
        self._began = time.perf_counter()

    def stop(self) -> dict[str, float | None]:
        """Joules since `start`, as `cpu` and `gpu`."""
        seconds = time.perf_counter() - self._began
        after = self._counters()
        cpu = None
        if self._before is not None and after is not None:
            cpu = 0.0
            for folder, start in self._before.items():
                used = after[folder] - start
                if used < 0:  # the counter has run over
                    used += int((folder / "max_energy_range_uj").read_text())
                cpu += used / 1e6
        gpu = None
        if self._sampler:
            self._sampler.terminate()
            said = self._sampler.communicate()[0].rpartition("\n")[0].splitlines()  # the last line may be half a number
            powers = [float(line) for line in said if line.strip().replace(".", "", 1).isdigit()]
            if powers:
                gpu = statistics.mean(powers) * seconds
            else:
                self.why["gpu"] = f"nvidia-smi named no power in {seconds:.1f} s"
            self._sampler = None
        return {"cpu": cpu, "gpu": gpu}

    def _counters(self) -> dict[Path, int] | None:
        if not self._packages:
            return None
        try:
            return {folder: int((folder / "energy_uj").read_text()) for folder in self._packages}
        except OSError as error:  # readable by root alone on most systems
            self.why["cpu"] = f"the RAPL counters cannot be read ({error.strerror})"
            return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
