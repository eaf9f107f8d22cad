"""`python -m pipeline` is the console script `rlhf`."""

import sys

if not sys.flags.safe_path:  # `-m` searches the working folder first, where a datasets.py hides the library
    sys.path.append(sys.path.pop(0))

from pipeline.cli import entry

entry()
