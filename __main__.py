"""`python -m qgraft`, and `torchrun -m qgraft`: the command line."""

import sys

from .quantizer.cli import main

sys.exit(main())
