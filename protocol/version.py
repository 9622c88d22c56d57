"""The versions the two processes compare: of the library, of the wire protocol, of the store on disk."""

LIBRARY_VERSION = "0.1.0"

# The wire: a peer offers a range, the highest common version wins.
LOWEST_PROTOCOL_VERSION = 2
HIGHEST_PROTOCOL_VERSION = 2

# The store on disk and in memory: there is no range, a record's bytes are what the kernels compute on.
STORE_FORMAT_VERSION = 2
