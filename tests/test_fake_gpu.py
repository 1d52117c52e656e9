"""The way over a GPU, without one: PyTorch's fake tensors say "cuda", hold no numbers and refuse to mix devices.

Stand-ins for the card: PyTorch's table of device guards gives "cuda" the guard of "meta", which does nothing, and CUDA is
never initialised. The backward pass runs on "meta", as the engine asks a card for its stream.
"""

import contextlib
import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from blm_core.config import ModelConfig, TrainConfig
from blm_core.evaluate import story_bits
from blm_core.evidence import inside
from blm_core.generate import Sampling, sample_tokens
from blm_core.model import LanguageModel
from blm_core.optimizer import make_optimizers

LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="the table of device guards is looked up in Linux's libc10.so"),
]
CUDA, META = torch.device("cuda", 0), torch.device("meta")
GUARDS, CUDA_GUARD, META_GUARD = "_ZN3c104impl26device_guard_impl_registryE", 1, 14  # c10::DeviceType
OLD = torch.__version__ < "2.2"
SHAPE = ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=32)


@pytest.fixture
def fake(monkeypatch):
    guards = (ctypes.c_void_p * (META_GUARD + 1)).in_dll(ctypes.CDLL(str(LIBRARY)), GUARDS)
    own, guards[CUDA_GUARD] = guards[CUDA_GUARD], guards[META_GUARD]
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    choose_kernels(False, False)  # with both switched off, PyTorch 2.1 chooses one without asking for the card
    yield FakeTensorMode(allow_non_fake_inputs=True)
    choose_kernels(*kernels)
    guards[CUDA_GUARD] = own


def choose_kernels(flash: bool, memory_efficient: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(memory_efficient)


class NothingHasEnded(TorchFunctionMode):
    """`if` over a fake tensor, which has no value, is False."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return False if function is torch.Tensor.__bool__ else function(*args, **(kwargs or {}))


def fake_model(fake, device=CUDA, **changes) -> LanguageModel:
    """A model made on the CPU, its tensors replaced by fake ones on `device`."""
    model = LanguageModel(replace(SHAPE, **changes))
    with fake:
        for module in model.modules():  # `to_empty` of PyTorch 2.1 would leave them on "meta"
            for name, weight in list(module.named_parameters(recurse=False)):
                module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, device=device))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty(buffer.shape, device=device)
    return model


def loss_of(model: LanguageModel) -> torch.Tensor:
    inputs, targets, stories = torch.zeros(4, 3, 32, dtype=torch.int64, device=model.device).unbind(1)
    return model(inputs, targets, stories=stories)


def test_fake_tensors_refuse_to_mix_devices(fake):
    with fake, pytest.raises(RuntimeError, match=r"[Dd]evice"):
        torch.zeros(2, device=CUDA) + torch.zeros(2)


@pytest.mark.parametrize("device", [CUDA, META], ids=str)
def test_loss_and_gradients_stay_on_the_device_of_the_model(fake, device):
    if OLD and device == META:
        fake = contextlib.nullcontext()  # PyTorch 2.1 has no fake tensors on "meta", so these are bare ones
    model = fake_model(fake, device, dropout=0.1).train()
    with fake:
        loss = loss_of(model)
        assert loss.device == device
        if device == META:
            loss.backward()
            assert {weight.grad.device for weight in model.parameters()} == {device}


@pytest.mark.skipif(OLD, reason="PyTorch 2.1 has no fake foreach and fused kernels")
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizers_step_on_the_gpu(fake, monkeypatch, name):
    monkeypatch.setattr("blm_core.optimizer.fast_bfloat16", lambda device: True)
    model = fake_model(fake)
    with fake:
        optimizers = make_optimizers(model, TrainConfig(optimizer=name))
        assert optimizers[-1].param_groups[0]["fused"]
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert {weight.device for weight in model.parameters()} == {CUDA}


def test_an_evaluation_stays_on_the_gpu_until_its_sums_are_read(fake):
    model, seen = fake_model(fake).eval(), []

    def logits_of(tokens):
        seen.append(model(tokens))
        return seen[-1]

    with fake, contextlib.suppress(RuntimeError):
        story_bits(logits_of, [np.arange(9), np.arange(20)], 32, CUDA)
    assert seen[0].device == CUDA


@torch.no_grad()
def test_what_is_inside_stays_on_the_gpu(fake):
    model = fake_model(fake).eval()
    with fake:
        attention, residual = inside.trace(model, np.arange(9))
        assert attention.device == residual.device == inside.lens(model, residual).device == CUDA


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5), Sampling(temperature=0)], ids=str)
def test_sampling_stays_on_the_gpu_to_the_end_of_the_context(fake, monkeypatch, sampling):
    # Fake tensors of PyTorch 2.1 take no generator.
    monkeypatch.setattr("blm_core.generate.uniforms", lambda prompts, numbers, seed, length: torch.zeros(len(prompts), length))
    model = fake_model(fake).eval()
    with fake, NothingHasEnded():
        steps = list(sample_tokens(model, [[0, 1, 2], [0, 1]], sampling, eot=0))
    assert [(step.device, step.shape) for step in steps] == [(CUDA, (2,))] * 30
