"""`python -m saccade.cli` is the command `saccade`."""

import sys

from saccade.cli import main

sys.exit(main())
