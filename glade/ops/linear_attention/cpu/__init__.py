"""The `cpu` backend: a compiled kernel without dependencies (`native/`), its binding, and the op."""

from glade.ops.linear_attention.cpu.op import refuses, run, say_absence, step_

__all__ = ["refuses", "run", "say_absence", "step_"]
