"""`python -m zoo`."""

import sys

from zoo.cli.entry import main

sys.exit(main())
