"""The former name of `megashear verify`, with the same options."""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
# Python puts this folder first, where inspect.py would hide Python's own module of that name.
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != HERE]

from megashear.cli import main  # noqa: E402

if __name__ == "__main__":
    main("verify")
