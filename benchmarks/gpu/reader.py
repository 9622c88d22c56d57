"""A process that reads shared memory until it is told to stop, and says the longest pause between two of its reads.

`python -m benchmarks.gpu.reader FD NBYTES`: prints a line when it has begun; the end of its standard input stops it.
"""

import mmap
import select
import sys
from time import perf_counter

_STEP_NBYTES = 1 << 20


def main() -> None:
    """Read one byte of each MiB, over and over; print the longest pause in milliseconds."""
    fd, nbytes = int(sys.argv[1]), int(sys.argv[2])
    memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
    print("reading", flush=True)
    longest_s, before_s = 0.0, perf_counter()
    is_told_to_stop = False
    while not is_told_to_stop:
        for offset in range(0, nbytes, _STEP_NBYTES):
            memory[offset]
            now_s = perf_counter()
            longest_s = max(longest_s, now_s - before_s)
            before_s = now_s
        is_told_to_stop = bool(select.select([sys.stdin], [], [], 0)[0])
    print(longest_s * 1000)


if __name__ == "__main__":
    main()
