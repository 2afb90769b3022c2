"""`python -m bench` is `pygpt bench`."""

import sys

if __name__ == "__main__":
    sys.argv[0] = "pygpt"  # so that what importing pygpt finds wrong is one line, too
    from pygpt import cli

    sys.exit(cli.main(["bench", *sys.argv[1:]]))
