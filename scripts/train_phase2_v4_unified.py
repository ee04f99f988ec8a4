"""The same as `indra train`, with the same options: see `python scripts/train_phase2_v4_unified.py --help`."""

import sys

from indraquantum.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
