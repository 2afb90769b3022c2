"""`python -m bench.first_light`; see plan.py."""

import sys

from .plan import main

if __name__ == "__main__":
    sys.exit(main())
