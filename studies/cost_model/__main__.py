"""python -m studies.cost_model: the entry alone."""

import sys

from .command import main

sys.exit(main())
