"""The errors a caller of glade can provoke. Bugs of ours are `assert`s, never one of these.

Every message says what was given, what is allowed, and what to do. A wrong shape or dtype handed to an op is a
plain `ValueError`; the command line prints a `GladeError` as one message and exits with a non-zero status.
"""


class GladeError(ValueError):
    """What every error below is, so that one `except` is enough for a program built on glade."""


class ConfigError(GladeError):
    """A setting that is unknown, of the wrong type, or at odds with another setting."""


class BackendError(GladeError):
    """A backend that this machine or this call cannot use."""


class CheckpointError(GladeError):
    """A checkpoint, state file or run folder that is missing, damaged, or of another model."""


class DataError(GladeError):
    """Text, tokens or a tokenizer that cannot be used."""
