"""``python -m m2mkd_fast`` is the command ``m2mkd``."""

from __future__ import annotations

import sys

from m2mkd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
