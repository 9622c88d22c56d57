"""Write a synthetic store: `python -m tools.synthetic_store`."""

from tools.synthetic_store.cli import main

if __name__ == "__main__":
    main(prog_name="python -m tools.synthetic_store")
