"""What expertd and its runners agree on: on disk, in shared memory, on the wire. Standard library and msgpack."""
