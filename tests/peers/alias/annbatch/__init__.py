"""annbatch, for processes that others' tests start: this package under its name."""

import os

from annbatch_dask import install_as_annbatch

install_as_annbatch()

if "ANNBATCH_INTERNALS" in os.environ:
    import annbatch_internals

    annbatch_internals.install()
