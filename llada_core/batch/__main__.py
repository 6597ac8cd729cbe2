"""python -m llada_core.batch: a file of requests through as many workers as there are."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
