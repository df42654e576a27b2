"""llama.cpp's decode step on a Llama of a given size with random weights, for bench/decode_cpu.py.

Needs `llama-cpp-python` and `gguf`. The head is the token table, as in the models it stands beside.
"""

from ctypes import c_float, string_at
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}
CONTEXT = 512


def write_model(path: Path, dtype: str, *, dim: int, layers: int, heads: int, vocab: int, parameters: int) -> int:
    """Writes the Llama whose number of parameters is nearest to `parameters`; returns it. Norms stay fp32."""
    per_layer = (parameters - vocab * dim - dim) / layers - 4 * dim * dim - 2 * dim
    hidden = round(per_layer / (3 * dim) / 32) * 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    total = 0

    def add(name: str, *shape: int) -> None:
        nonlocal total
        total += int(np.prod(shape))
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            return
        weights = random.standard_normal(shape, np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(weights, TYPES[dtype]), raw_dtype=TYPES[dtype])

    add("token_embd.weight", vocab, dim)
    add("output_norm.weight", dim)
    for i in range(layers):
        add(f"blk.{i}.attn_norm.weight", dim)
        add(f"blk.{i}.ffn_norm.weight", dim)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", dim, dim)
        add(f"blk.{i}.ffn_gate.weight", hidden, dim)
        add(f"blk.{i}.ffn_up.weight", hidden, dim)
        add(f"blk.{i}.ffn_down.weight", dim, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


class Decoder:
    """One token for each of `batch` sequences a call, as in `llama_decode`; the cache begins anew when it is full."""

    def __init__(self, path: Path, batch: int, threads: int, vocab: int) -> None:
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = CONTEXT * batch, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context
        self.batch, self.vocab, self.position = llama_cpp.llama_batch_init(batch, 0, 1), vocab, 0
        self.batch.n_tokens = batch
        for i in range(batch):
            self.batch.token[i] = i + 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, i, 1

    def step(self) -> None:
        if self.position == CONTEXT // 4:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            self.position = 0
        for i in range(self.batch.n_tokens):
            self.batch.pos[i] = self.position
        self.position += 1
        status = llama_cpp.llama_decode(self.context, self.batch)
        assert status == 0, status
        # the logits are there when the call returns; touching one is what a sampler would do first
        string_at(llama_cpp.llama_get_logits(self.context), len(bytes(c_float())))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
