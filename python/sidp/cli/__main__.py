"""`python -m sidp.cli`, for checkouts where the `sidp` script is not installed."""

import sys

from . import main

if __name__ == "__main__":  # spawned ranks import this module again under another name
    sys.exit(main())
