"""Run the command: `python -m tools.demo_checkpoint OUT`."""

from tools.demo_checkpoint.cli import main

if __name__ == "__main__":
    main(prog_name="python -m tools.demo_checkpoint")
