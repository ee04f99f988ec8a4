"""The same as `indra prepare`, with the same options: see `python scripts/prepare_mixed_data.py --help`."""

import sys

from indraquantum.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
