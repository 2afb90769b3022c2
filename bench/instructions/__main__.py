"""`python -m bench.instructions`; see count.py."""

import sys

from .count import main

if __name__ == "__main__":
    sys.exit(main())
