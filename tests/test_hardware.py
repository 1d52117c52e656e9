"""What is found out about the machine."""

import platform

import pytest
import torch

from blm_core.hardware import device_name, fast_bfloat16, memory, mfu, power, precision, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_precision_that_is_named_is_used(dtype):
    assert resolve_dtype(CPU, dtype) == dtype


def test_the_automatic_precision_is_bfloat16_only_where_it_is_fast():
    assert resolve_dtype(CPU, "auto") == ("bfloat16" if fast_bfloat16(CPU) else "float32")
    assert resolve_dtype(torch.device("meta"), "auto") == "float32"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_matrices_are_multiplied_in_the_precision_that_is_resolved_and_weights_stay_wide(dtype):
    weight = torch.nn.Linear(4, 4)
    with precision(CPU, dtype):
        made = weight(torch.ones(1, 4))
    assert made.dtype == getattr(torch, resolve_dtype(CPU, dtype))
    made.sum().backward()
    assert weight.weight.dtype == weight.weight.grad.dtype == torch.float32
    assert weight(torch.ones(1, 4)).dtype == torch.float32


def test_a_processor_has_a_name_no_known_peak_and_no_power_to_read():
    assert f"{torch.get_num_threads()} threads" in device_name(CPU)
    assert mfu(1e9, CPU) is None
    assert power(CPU) is None


@pytest.mark.skipif(platform.system() != "Linux", reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_process_in_gigabytes_and_grows_with_it():
    before = memory(CPU)
    held = torch.ones(max(1, int(before * 1e9 / 4)) + 50_000_000)  # so much that the peak before must be passed
    assert memory(CPU) >= before + 0.15
    assert held[0] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_states_its_power_memory_and_name():
    gpu = torch.device("cuda", 0)
    held = torch.ones(10_000_000, device=gpu)
    assert power(gpu) > 0
    assert memory(gpu) >= 0.04
    assert device_name(gpu) == torch.cuda.get_device_name(0)
    assert held[0] == 1
