"""What scripts/bench.py measures: a module for each command, and `models` and `common` for what they share.

A command's module has `run(args)`. Its docstring says what is compared.
"""

from utils.attach import attach
from utils.common import settle_accelerator

attach()
settle_accelerator()
