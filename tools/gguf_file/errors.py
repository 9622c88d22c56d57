"""The errors of writing GGUF files.

GgufFileError
├── SizesDoNotFit    a matrix whose inputs do not divide into the type's blocks
├── SourceInvalid    a checkpoint or tokenizer that llama.cpp has no equal of
└── OutputError      the file cannot be written there
"""


class GgufFileError(Exception):
    """Base of all errors of this package."""


class SizesDoNotFit(GgufFileError):
    """A matrix whose inputs do not divide into the type's blocks."""


class SourceInvalid(GgufFileError):
    """A checkpoint or tokenizer that llama.cpp has no equal of."""


class OutputError(GgufFileError):
    """The file cannot be written there."""
