"""The native decode step of the CPU: a model as a list of instructions that one call runs for one token a row."""

from glade.infer.native.lower import lower
from glade.infer.native.program import Program

__all__ = ["Program", "lower"]
