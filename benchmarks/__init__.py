"""Speed and memory, measured. Each file measures one thing; `python -m benchmarks` runs them and keeps the figures."""
