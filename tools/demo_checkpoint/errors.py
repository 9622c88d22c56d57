"""The errors of building the demo checkpoint.

DemoCheckpointError
├── FetchError      the source model could not be had
├── SourceError     a GGUF file that is not the model expected
└── OutputError     the checkpoint cannot be written there
"""


class DemoCheckpointError(Exception):
    """Base of all errors of this package."""


class FetchError(DemoCheckpointError):
    """The source model could not be had."""


class SourceError(DemoCheckpointError):
    """A GGUF file that is not the model expected."""


class OutputError(DemoCheckpointError):
    """The checkpoint cannot be written there."""
