"""Write a GGUF file: `python -m tools.gguf_file`."""

from tools.gguf_file.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m tools.gguf_file")
