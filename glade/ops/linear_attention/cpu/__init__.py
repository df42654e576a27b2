"""The `cpu` backend: a compiled kernel without dependencies, its binding, and the op."""
