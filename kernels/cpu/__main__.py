"""Compile the native kernels now: ``python -m qgraft.kernels.cpu`` prints where they are, or why there are none."""

import sys

from . import native

try:
    print(native.build())
except native.Unavailable as why:
    sys.exit(f"no native CPU kernels, because {why}")
