"""Run `python -m studies.speedrun`."""

import sys

from optim.errors import Refusal

from .command import main

try:
    sys.exit(main(sys.argv[1:]))
except Refusal as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
