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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_accepts_the_tensor_type_of_the_cpu(mesh: object, dtype: torch.dtype) -> None:
    from megatron.core.optimizer import clip_grads

    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    weight.grad = torch.tensor([3.0, 4.0], dtype=dtype)
    clip_grads.clip_grad_by_total_norm_fp32([weight], 1.0, 5.0)
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8], dtype=dtype))


def test_clipping_still_refuses_half_precision(mesh: object) -> None:
    from megatron.core.optimizer import clip_grads

    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.grad = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        clip_grads.clip_grad_by_total_norm_fp32([weight], 1.0, 5.0)
