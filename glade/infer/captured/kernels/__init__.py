"""The Triton kernels of a decode step. Triton comes with torch's CUDA builds; nothing here is imported without it."""
