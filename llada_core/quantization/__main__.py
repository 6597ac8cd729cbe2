"""python -m llada_core.quantization: a released checkpoint folder in fewer bits."""

import sys

from ..conversion.command import main

if __name__ == "__main__":
    sys.exit(main())
