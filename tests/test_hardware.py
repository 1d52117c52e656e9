"""What is found out about the machine."""

import contextlib
import os
import platform
import sys
import time

import pytest
import torch

from blm_core.hardware import PowerSampler, device_name, fast_bfloat16, memory, mfu, precision, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_matrices_are_multiplied_in_the_precision_that_is_resolved_and_weights_stay_wide(dtype):
    resolved = resolve_dtype(CPU, dtype)
    assert resolved == (dtype if dtype != "auto" else "bfloat16" if fast_bfloat16(CPU) else "float32")
    weight = torch.nn.Linear(4, 4)
    with precision(CPU, dtype):
        made = weight(torch.ones(1, 4))
    assert made.dtype == getattr(torch, resolved)
    made.sum().backward()
    assert weight.weight.dtype == weight.weight.grad.dtype == torch.float32


@pytest.mark.skipif(platform.system() != "Linux", reason="names and peaks are read from /proc")
def test_a_processor_has_a_name_no_known_peak_and_memory_that_grows():
    assert f"{torch.get_num_threads()} threads" in device_name(CPU)
    assert mfu(1e9, CPU) is None
    before = memory(CPU)
    held = torch.ones(max(1, int(before * 1e9 / 4)) + 50_000_000)  # so much that the peak before must be passed
    assert memory(CPU) >= before + 0.15
    assert held[0] == 1


# It answers for one GPU only.
NVIDIA_SMI = """#!{python}
import sys, time
assert sys.argv[1] == "--id={gpu}", sys.argv
print("[N/A]", 100, 200, 300, sep="\\n", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("visible", "index", "name"), [("", 1, "1"), ("2,3", 1, "3"), ("GPU-5a, GPU-6b", None, "GPU-5a")])
def test_power_is_the_mean_over_the_interval_on_the_gpu_that_pytorch_uses(tmp_path, monkeypatch, visible, index, name):
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(python=sys.executable, gpu=name))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with contextlib.closing(PowerSampler(torch.device("cuda", index))) as sampler:
        deadline = time.monotonic() + 30
        while len(sampler._readings) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sampler.watts() == 200
        assert sampler.watts() is None
    assert sampler._process.poll() is not None


def test_power_that_cannot_be_read_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for device in ("cuda", "cpu"):
        with contextlib.closing(PowerSampler(torch.device(device))) as sampler:
            assert sampler.watts() is None
