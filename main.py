"""`python main.py` from a checkout is the same as the installed command `minigpt`."""

import sys

from minigpt_pl.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
