"""`python -m expertd` is `expertd`."""

from expertd.cli import main

main()
