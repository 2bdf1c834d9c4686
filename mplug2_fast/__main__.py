"""`python -m mplug2_fast` is the `mplug2-fast` command."""

from mplug2_fast.cli import main

if __name__ == "__main__":
    main()
