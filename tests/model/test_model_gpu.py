"""The same model on a GPU: fp32 logits as on the CPU, states that travel both ways."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glade.model import LanguageModel

pytestmark = pytest.mark.gpu


def test_a_gpu_answers_as_the_cpu_and_states_travel(
    case: str, build: Callable[..., LanguageModel], make_ids: Callable[..., Tensor]
) -> None:
    """In fp64, where both devices compute the same backend's sums: only rounding is left between them."""
    model, ids = build(case, torch.float64), make_ids(2, 23)
    with torch.no_grad():
        expected, on_cpu = model(ids)
        follow = model(ids[:, :5], on_cpu)[0]
        model = model.cuda()
        logits, on_gpu = model(ids.cuda())
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-9)
        moved = on_cpu.to("cuda")
        torch.testing.assert_close(model(ids[:, :5].cuda(), moved)[0].cpu(), follow, rtol=0, atol=1e-9)
        state = on_gpu.clone()
        steps = [model.step_(ids[:, t].cuda(), state) for t in range(5)]
        torch.testing.assert_close(torch.stack(steps, 1).cpu(), follow, rtol=0, atol=1e-9)
        back = on_gpu.to("cpu")
        torch.testing.assert_close(model.cpu()(ids[:, :5], back)[0], follow, rtol=0, atol=1e-9)
