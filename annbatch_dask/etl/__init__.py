"""scan, plan, scatter, gather, commit: the build, as idempotent tasks that Dask runs."""
