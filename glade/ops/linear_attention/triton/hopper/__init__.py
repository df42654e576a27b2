"""Kernels for sm_90 in Gluon, in the place of those in Triton for the calls that they serve.

    launches            which calls those are, and the launches
    pipeline            shared memory that one warp fills while four compute
    scalar_states       the passes over states of `triton/scalar_states.py`: scalar gates
    scalar_keys         the gradients of `triton/scalar_keys.py`
    vector_states       the passes over states of `triton/states.py`: a vector decay
    levels              what those below share: sums of logs as products, and pairs by levels
    vector_prepare      what a chunk with a vector decay is prepared by, as `triton/prepare.py`, but for the inverse
    vector_keys         the gradients of `triton/vector_keys.py`, with an erase
    vector_span_keys    and without, spans of two chunks

The equations, and the forms in memory of what is kept, are those of the kernels in Triton.
"""
