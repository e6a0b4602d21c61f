"""`python -m cggr_compile`."""

from cggr_compile.cli import app

if __name__ == "__main__":
    app(prog_name="cggr-compile")
