#!/usr/bin/env python3
"""Shuffle AnnData files on a Dask cluster that is already running.

shuffle_on_cluster.py tcp://head-node:8786 OUT.zarr FILES...

The workers must see the files, the output and the scratch folder under the same paths.
"""

from __future__ import annotations

import argparse
import sys

from distributed import Client

from annbatch_dask import DatasetCollection


def main() -> int:
    """Read the command line and shuffle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheduler", help="address of the scheduler")
    parser.add_argument("output", help="the collection to write")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--dataset-size", default="2GB", help="rows or bytes of a dataset")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with Client(args.scheduler) as client:
        collection = DatasetCollection(args.output)
        plan = collection.plan_adatas(args.files, dataset_size=args.dataset_size, seed=args.seed, client=client)
        print(plan.summary())
        collection.add_adatas(args.files, dataset_size=args.dataset_size, seed=args.seed, client=client)
    print(f"{args.output}: {collection.n_obs:,} cells x {collection.n_var:,} genes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
