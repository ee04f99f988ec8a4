"""The same as `indra test`, with the same options: see `python scripts/test_phase2.py --help`."""

import sys

from indraquantum.cli import main

if __name__ == "__main__":
    main(["test", *sys.argv[1:]])
