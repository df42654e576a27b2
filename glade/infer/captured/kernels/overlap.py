"""Kernels that begin while the one before them ends (programmatic dependent launch, from Hopper on).

A kernel may read before `wait` what the kernel just before it does not write: weights, the state, which rows sit where.
After it, all that was launched before is done, and the next kernel may begin in turn.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
