"""Measure on a GPU: `python -m benchmarks.gpu`."""

from benchmarks.gpu.cli import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
