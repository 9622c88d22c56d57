"""The errors of the runner.

RunnerError
├── ConfigInvalid       an option, in the file or as a flag, that is unknown or out of range
├── StoreInvalid        a store whose files contradict each other or lack what the model needs
├── UnsupportedModel    a model this version does not compute
├── CorruptExpert       an expert whose bytes do not match their checksum
├── ReadFailed          an expert that expertd cannot read from the disk
├── StoreUnavailable    no daemon serves the store, and none could be started
│   └── SessionGone     the session with the daemon ended, and with it the slots it had
├── StoreChanged        the store is no longer the one that was attached
├── OutOfMemory         memory that cannot be had
├── ContextFull         the kv_cache holds no room for further tokens
├── PromptTooLong       the prompt alone does not fit into the context
├── PromptInvalid       a prompt or text that cannot be computed: empty, unreadable, unknown token ids
├── DeviceUnavailable   the device that was asked for cannot be used
├── DeviceFailed        a device that reported an error: what it computed is lost
├── TokenizerInvalid    the store's tokenizer cannot be read
├── TemplateError       the store's chat template is missing, damaged or refuses the conversation
└── NotFinite           logits that are no numbers
"""


class RunnerError(Exception):
    """Base of all errors of this package; str() is the one line a user sees."""


class ConfigInvalid(RunnerError):
    """An option that is unknown or out of range."""


class StoreInvalid(RunnerError):
    """A store whose files contradict each other or lack what the model needs."""


class UnsupportedModel(RunnerError):
    """A model that this version does not compute."""


class CorruptExpert(RunnerError):
    """An expert whose bytes do not match their checksum."""


class ReadFailed(RunnerError):
    """An expert that expertd cannot read from the disk."""


class StoreUnavailable(RunnerError):
    """No daemon serves the store, and none could be started."""


class SessionGone(StoreUnavailable):
    """The session with the daemon ended; what it had mapped stays readable, but nothing new comes in."""


class StoreChanged(RunnerError):
    """The store is no longer the one that was attached."""


class OutOfMemory(RunnerError):
    """Memory that cannot be had."""


class ContextFull(RunnerError):
    """The kv_cache holds no room for further tokens."""


class PromptTooLong(RunnerError):
    """The prompt alone does not fit into the context."""


class PromptInvalid(RunnerError):
    """A prompt or text that cannot be computed."""


class DeviceUnavailable(RunnerError):
    """The device that was asked for cannot be used."""


class DeviceFailed(RunnerError):
    """A device that reported an error; what it computed is lost."""


class TokenizerInvalid(RunnerError):
    """The store's tokenizer cannot be read."""


class TemplateError(RunnerError):
    """The store's chat template is missing, damaged or refuses the conversation."""


class NotFinite(RunnerError):
    """Logits that are no numbers."""
