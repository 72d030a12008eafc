"""``python -m pgoutput_source``: see `cli`."""

import sys

from pgoutput_source.cli import main

sys.exit(main())
