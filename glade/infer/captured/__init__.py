"""The decode step of a GPU: a model as a few Triton kernels a layer, recorded as a CUDA graph with the sampling.

    lower         LanguageModel to instructions (linear: the linear mixers)      weights    laid together for it
    instructions  what each launches                                            kernels/   Triton
    program       instructions on a state                                       graphs     recording and replaying

Triton comes with torch's CUDA builds: `lower` is imported where a model is on a GPU, and not elsewhere.
"""
