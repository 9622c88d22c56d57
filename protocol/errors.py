"""The errors of what is agreed on.

ProtocolError
├── MalformedMessage    bytes from a peer that are no message of the schema
├── VersionMismatch     the peers have no protocol version in common
├── UnknownScheme       a quantization scheme this version does not know
├── UnknownLayout       a record layout this version does not know
├── LayoutError         a matrix that does not fit its scheme
├── ManifestError       a manifest that is damaged, hostile or of another format version
├── ModelConfigInvalid  a model's config.json that is damaged or contradicts itself
├── ModelUnsupported    a model of a kind this version does not compute
├── SegmentError        shared memory that is not what was promised: seals, size, bounds
├── OutOfMemory         memory for a segment could not be had
├── RuntimeDirError     the directory of the sockets is not safely ours
├── DaemonUnavailable   nobody answers on the control socket
│   └── DaemonSilent    somebody listens there, and does not answer
├── FaultPointUnknown   an order for a fault point that names none
└── RequestRefused      the daemon's answer to a request it will not carry out
"""


class ProtocolError(Exception):
    """Base of all errors of this package."""


class MalformedMessage(ProtocolError):
    """Bytes that are no message of the schema."""


class VersionMismatch(ProtocolError):
    """No protocol version in common."""


class UnknownScheme(ProtocolError):
    """A quantization scheme that this version does not know."""


class UnknownLayout(ProtocolError):
    """A record layout that this version does not know."""


class LayoutError(ProtocolError):
    """A matrix whose shape does not fit its scheme."""


class ManifestError(ProtocolError):
    """A manifest that is damaged, hostile or of another format version."""


class ModelConfigInvalid(ProtocolError):
    """A model's config.json that is damaged or contradicts itself."""


class ModelUnsupported(ProtocolError):
    """A model of a kind that this version does not compute."""


class SegmentError(ProtocolError):
    """Shared memory that is not what was promised."""


class OutOfMemory(ProtocolError):
    """Memory for a segment could not be had."""


class RuntimeDirError(ProtocolError):
    """The directory of the sockets is not safely ours."""


class DaemonUnavailable(ProtocolError):
    """Nobody answers on the control socket."""


class DaemonSilent(DaemonUnavailable):
    """Somebody listens at the control socket, and does not answer in time."""


class FaultPointUnknown(ProtocolError):
    """An order for a fault point that names none."""


class RequestRefused(ProtocolError):
    """The daemon's answer to a request it will not carry out; `code` says why in one of the schema's words."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.code = code
        self.detail = detail
