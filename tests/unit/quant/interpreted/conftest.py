"""Tests of the kernels' numbers under Triton's interpreter, which is chosen before triton is imported, or never.

test_triton_numbers.py runs this folder in a process of its own. By hand: TRITON_INTERPRET=1 pytest with this folder.
"""

from triton import knobs

collect_ignore_glob = [] if knobs.runtime.interpret else ["test_*.py"]
