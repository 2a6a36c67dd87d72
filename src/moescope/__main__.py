"""``python -m moescope``: the same as the command ``moescope``."""

from moescope.cli import main

if __name__ == "__main__":
    main(prog_name="moescope")
