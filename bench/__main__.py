"""`python -m bench` is `pygpt bench`."""

import sys

from pygpt import cli

if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
