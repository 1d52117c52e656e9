"""The road over a GPU, without one: PyTorch's fake tensors say "cuda", hold no numbers and refuse to mix devices.

What a fake tensor cannot know, the value of a loss or of a drawn token, ends the part that is tested.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from blm_core.config import ModelConfig, TrainConfig
from blm_core.evaluate import story_bits
from blm_core.evidence import inside
from blm_core.model import LanguageModel, dropout_bytes
from blm_core.optimizer import make_optimizers

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(torch.__version__ < "2.2", reason="fake tensors of PyTorch 2.1 ask for a CUDA driver"),
]
CUDA = torch.device("cuda", 0)
SHAPE = ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=32)


class Indexing(TorchFunctionMode):
    """`x[...]` by the operators behind it: Python's indexing asks for a driver before fake tensors are reached."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return indexed(*args)
        if function is torch.Tensor.__setitem__:
            x, index, value = args
            if isinstance(index, torch.Tensor):
                return x.masked_fill_(index, value)
            return indexed(x, index).copy_(value)
        return function(*args, **(kwargs or {}))


def indexed(x, index):
    at = 0
    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            x, at = x.unsqueeze(at), at + 1
        elif item is Ellipsis:
            at = x.ndim - 1  # here only with one index behind it
        elif isinstance(item, slice):
            x, at = torch.ops.aten.slice.Tensor(x, at, item.start, item.stop, item.step or 1), at + 1
        else:
            x = x.select(at, item)
    return x


@pytest.fixture
def fake():
    with Indexing():
        yield FakeTensorMode(allow_non_fake_inputs=True)


def model_on_gpu(fake: FakeTensorMode, **changes) -> LanguageModel:
    """A model made on the CPU, its tensors replaced by fake ones on the GPU."""
    model = LanguageModel(replace(SHAPE, **changes))
    with fake:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                module._parameters[name] = torch.nn.Parameter(fake.from_tensor(weight.detach()).to(CUDA))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = fake.from_tensor(buffer).to(CUDA)
    return model


def test_fake_tensors_refuse_to_mix_devices(fake):
    with fake, pytest.raises(RuntimeError, match=r"[Dd]evice"):
        torch.zeros(2, device=CUDA) + torch.zeros(2)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loss_and_optimizer_stay_on_the_gpu(fake, monkeypatch, name):
    # All but `backward`: the engine wants a thread for every real card, and ends the process where there is none.
    monkeypatch.setattr("blm_core.optimizer.fast_bfloat16", lambda device: True)
    model = model_on_gpu(fake, dropout=0.1).train()
    with fake:
        batch = torch.zeros(4, 3, 32, dtype=torch.int64).to(CUDA)
        inputs, targets, stories = batch.unbind(1)
        with torch.no_grad():
            loss = model(inputs, targets, stories=stories, noise=dropout_bytes(model.config, inputs))
        assert loss.device == CUDA
        optimizers = make_optimizers(model, TrainConfig(optimizer=name))
        assert optimizers[-1].param_groups[0]["fused"]
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert all(weight.device == CUDA for weight in model.parameters())


def test_an_evaluation_stays_on_the_gpu_until_its_sums_are_read(fake):
    model, seen = model_on_gpu(fake).eval(), []

    def logits_of(tokens):
        seen.append(model(tokens))
        return seen[-1]

    with fake, pytest.raises((DataDependentOutputException, RuntimeError), match=r"local_scalar|not linked|driver"):  # `tolist`
        story_bits(logits_of, [np.arange(9), np.arange(20)], 32, CUDA)
    assert seen[0].device == CUDA


@torch.no_grad()
def test_what_is_inside_stays_on_the_gpu(fake):
    model = model_on_gpu(fake).eval()
    with fake:
        seen = inside.trace(model, np.arange(9))
        assert {part.device for part in (seen.attention, seen.hidden, seen.residual)} == {CUDA}
        assert inside.lens(model, seen.residual).device == CUDA
