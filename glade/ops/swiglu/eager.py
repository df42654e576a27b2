"""The product in torch's own functions, left to autograd: backend `torch`."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
