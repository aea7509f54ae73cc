"""What the workers of a local cluster share: their fork server imports this module before it forks them."""

import gc
import importlib

gc.disable()  # imports leave nothing to collect, and looking for it takes a seventh of their time
for _name in ("annbatch_dask.preload", "anndata", "distributed.nanny"):
    importlib.import_module(_name)
importlib.import_module("annbatch_dask.preload").start_numba()
gc.freeze()  # nor will there be, which the workers need not look through
gc.enable()
