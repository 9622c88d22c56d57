"""The C kernels on another instruction set, under emulation: `python -m tests.cross_check`."""
