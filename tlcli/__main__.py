"""`python -m tlcli` is `tlcli`."""

import sys

from tlcli.cli import main

if __name__ == "__main__":
    sys.exit(main())
