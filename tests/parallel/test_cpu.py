"""The CPU answers Megatron's CUDA assumptions, and nobody else's."""

import pytest
import torch

from iomm.parallel import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU prepare() does nothing")


def test_megatron_sees_the_cpu_where_it_asks_for_cuda() -> None:
    cpu.prepare()
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
    assert clip_grads.torch.float32 is torch.float32


def test_prepare_leaves_torch_itself_alone() -> None:
    before = (torch.zeros, torch.cuda.current_device, torch.Tensor.type, torch.Tensor.to, torch.cuda.Stream)
    cpu.prepare()
    cpu.prepare()
    assert before == (
        torch.zeros,
        torch.cuda.current_device,
        torch.Tensor.type,
        torch.Tensor.to,
        torch.cuda.Stream,
    )
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_transformer_engine_is_not_importable_without_a_gpu() -> None:
    cpu.prepare()
    with pytest.raises(ImportError):
        __import__("transformer_engine")
