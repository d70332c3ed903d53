"""`python -m orbit` is the command `orbit`."""

import sys

from orbit.cli import main

if __name__ == "__main__":
    sys.exit(main())
