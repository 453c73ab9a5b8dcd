"""`python -m megashear` is `megashear`."""

from __future__ import annotations

from megashear.cli import main

if __name__ == "__main__":
    main()
