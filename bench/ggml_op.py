"""llama.cpp's `gated_delta_net` (GDN and KDA, forward only) as a function of torch tensors, by ctypes on its ggml.

The libraries are those of llama-cpp-python, built from source for this processor:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36

What is timed is the graph alone: copies into ggml's memory and out of it are not.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FLOAT32 = 0
POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class InitParams(ctypes.Structure):
    """`ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


# name, result, arguments
FUNCTIONS = (
    ("ggml_init", POINTER, (InitParams,)),
    ("ggml_free", None, (POINTER,)),
    ("ggml_new_tensor_4d", POINTER, (POINTER, ctypes.c_int, INT64, INT64, INT64, INT64)),
    ("ggml_gated_delta_net", POINTER, (*[POINTER] * 7, INT64)),
    ("ggml_new_graph", POINTER, (POINTER,)),
    ("ggml_build_forward_expand", None, (POINTER, POINTER)),
    ("ggml_get_data", POINTER, (POINTER,)),
    ("ggml_graph_compute_with_ctx", ctypes.c_int, (POINTER, POINTER, ctypes.c_int)),
)


def libraries() -> list[Path]:
    """ggml's libraries in the order in which they need each other; none where llama-cpp-python is not installed."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0]) / "lib"
    return [folder / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu")]


def bind(paths: list[Path]) -> dict[str, Callable]:
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]
    bound = {}
    for name, result, arguments in FUNCTIONS:
        function = next(getattr(library, name) for library in loaded if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        bound[name] = function
    return bound


class GatedDeltaNet:
    """One graph with the inputs copied in: `compute()` runs it, `output()` is o [B, T, HV, V] of the last run.

    q, k [B, T, H, D], v [B, T, H, D], g [B, T, H] (GDN) or [B, T, H, D] (KDA), beta [B, T, H], fp32; state from zeros.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor):
        self._ggml = bind(libraries())
        B, _, H, D = v.shape
        gate = g if g.dim() == 4 else g.unsqueeze(-1)
        inputs = [q, k, v, gate, beta.unsqueeze(-1), v.new_zeros(B, H, D, D)]
        floats = sum(x.numel() for x in inputs) + v.numel() + B * H * D * D
        # besides the tensors: the graph, and the work space that every run takes anew
        self._context = self._ggml["ggml_init"](InitParams(4 * floats + (64 << 20), None, False))
        tensors = [self._tensor(x) for x in inputs]
        self._result = self._ggml["ggml_gated_delta_net"](self._context, *tensors, 1)
        self._graph = self._ggml["ggml_new_graph"](self._context)
        self._ggml["ggml_build_forward_expand"](self._graph, self._result)
        self._shape = v.shape

    def _tensor(self, x: Tensor) -> int:
        x = x.detach().contiguous()
        tensor = self._ggml["ggml_new_tensor_4d"](self._context, FLOAT32, *reversed(x.shape))
        ctypes.memmove(self._ggml["ggml_get_data"](tensor), x.data_ptr(), 4 * x.numel())
        return tensor

    def compute(self) -> None:
        status = self._ggml["ggml_graph_compute_with_ctx"](self._context, self._graph, torch.get_num_threads())
        assert status == 0, status

    def output(self) -> Tensor:
        o = torch.empty(self._shape)
        ctypes.memmove(o.data_ptr(), self._ggml["ggml_get_data"](self._result), 4 * o.numel())
        return o

    def __del__(self) -> None:
        self._ggml["ggml_free"](self._context)
