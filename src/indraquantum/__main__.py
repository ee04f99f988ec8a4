"""The command `indra` as a module, for launchers: torchrun --nproc-per-node 2 -m indraquantum train."""

from indraquantum.cli import main

if __name__ == "__main__":
    main()
