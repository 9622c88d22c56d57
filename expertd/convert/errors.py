"""The converter's errors; str() of each is the one line its user sees.

ConvertError
├── ConfigError              a quantization configuration that cannot be meant
├── CheckpointError          a checkpoint that cannot be read
│   ├── NotAMixtral          a model of another kind
│   ├── MalformedCheckpoint  configuration, index or header that is damaged or hostile
│   ├── WrongTensor          a tensor that is missing, unknown, of another shape or of no float type
│   ├── GroupsDoNotDivide    a matrix whose inputs do not divide into its scheme's groups
│   ├── NotFinite            weights that are NaN or infinite
│   └── NotOnHub             what the Hub has not, or does not give to us
├── FetchFailed              the Hub cannot be reached, or gives other bytes than it promises
├── StoreExists              something stands where the store should go
├── NotAStore                what stands there is no store, so it is not replaced
├── NoDiskSpace              the store does not fit
├── WriteFailed              the file system refused
├── EncodeFailed             a matrix that the solver could not encode
├── WorkerDied               a worker process ended before its work did
└── Terminated               the process was asked to end before the store was complete
"""


class ConvertError(Exception):
    """Base of all errors of the converter."""


class ConfigError(ConvertError):
    """A quantization configuration that cannot be meant."""


class CheckpointError(ConvertError):
    """A checkpoint that cannot be read."""


class NotAMixtral(CheckpointError):
    """A model of another kind."""


class MalformedCheckpoint(CheckpointError):
    """A configuration, an index or a header that is damaged or hostile."""


class WrongTensor(CheckpointError):
    """A tensor that is missing, unknown, of another shape or of no float type."""


class GroupsDoNotDivide(CheckpointError):
    """A matrix whose inputs do not divide into its scheme's groups."""


class NotFinite(CheckpointError):
    """Weights that are NaN or infinite."""


class NotOnHub(CheckpointError):
    """What the Hub has not, or does not give to us."""


class FetchFailed(ConvertError):
    """The Hub cannot be reached, or gives other bytes than it promises."""


class StoreExists(ConvertError):
    """Something stands where the store should go."""


class NotAStore(ConvertError):
    """What stands where the store should go is no store, so it is not replaced."""


class NoDiskSpace(ConvertError):
    """The store does not fit on its file system."""


class WriteFailed(ConvertError):
    """The file system refused."""


class EncodeFailed(ConvertError):
    """A matrix that the solver could not encode."""


class WorkerDied(ConvertError):
    """A worker process ended before its work did."""


class Terminated(ConvertError):
    """The process was asked to end before the store was complete."""
