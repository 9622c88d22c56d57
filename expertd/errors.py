"""The errors of the daemon and its command line. What a user sees is the message, one line.

ExpertdError
├── ConfigError      a configuration file or value that is wrong
├── ProfileInvalid   a file that is no routing trace
├── StoreInvalid     a directory that is no store, or a damaged one
├── LoadCancelled    the store is no longer wanted
├── AlreadyRunning   another daemon of this user holds the lock
├── StartFailed      the daemon did not come up
├── PlaceLost        the directory where clients meet the daemon was removed or replaced
└── LoadFailed       the daemon could not load a store
"""


class ExpertdError(Exception):
    """Base of all errors of this package."""


class ConfigError(ExpertdError):
    """A configuration file or value that is wrong."""


class ProfileInvalid(ExpertdError):
    """A file that is no routing trace."""


class StoreInvalid(ExpertdError):
    """A directory that is no store, or a damaged one."""


class LoadCancelled(ExpertdError):
    """The store is no longer wanted."""


class AlreadyRunning(ExpertdError):
    """Another daemon of this user holds the lock."""


class StartFailed(ExpertdError):
    """The daemon did not come up."""


class PlaceLost(ExpertdError):
    """The directory where clients meet the daemon was removed or replaced."""


class LoadFailed(ExpertdError):
    """The daemon could not load a store."""
