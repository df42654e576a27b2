"""Text and tokens: tokenizers, corpora, memory-mapped shards, and the batches that training and evaluation read."""
