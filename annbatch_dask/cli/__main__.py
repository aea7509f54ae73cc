"""``python -m annbatch_dask.cli``."""

import sys

from annbatch_dask.cli.command_line import main

sys.exit(main())
