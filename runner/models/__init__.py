"""The architectures: one file each, in the order of the computation."""
