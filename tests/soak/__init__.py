"""Minutes of random kills of runners and daemon, ending in a report: `make soak MINUTES=10`, `python -m tests.soak`."""
