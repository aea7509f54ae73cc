"""Run the peers' own tests on this package: downloads their sources, and says which tests fail that should not.

    python tests/peers/upstream.py scvi-tools | annbatch | scdataset [pytest's arguments]

With scvi-tools, ``tests/peers/test_scvi.py`` runs too: it calls all models that have ``setup_annbatch``.

Run with an interpreter that has this project's test dependencies: for scvi-tools 3.11, whose torch is small.
Everything is put below ``.peers``, for each version of Python apart; a second run waits for the first.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".peers" / f"{sys.version_info.major}.{sys.version_info.minor}"
VERSIONS = {"scvi-tools": "1.5.1", "annbatch": "0.3.1", "scdataset": "0.3.0"}
TESTS = {"scvi-tools": ["tests/dataloaders/test_annbatch.py", "--custom-dataloader-tests"], "annbatch": ["tests"]}
# Ranks whose generators cannot be compared are warned of, and annbatch's tests make errors of warnings.
TESTS["annbatch"] += ["-W", "ignore:rank"]
TESTS["scdataset"] = ["tests", "-c", os.devnull, "--rootdir=."]
OURS = ("tests/peers/test_scvi.py", "-k", "ours and (model or rows)")
# What scvi-tools needs beside what is installed for the tests, and has no other dependencies of its own.
SCVI = (
    "scvi-tools==1.5.1", "absl-py", "docrep", "grpcio", "ml-collections", "mudata<0.4", "opt-einsum", "protobuf", "pyro-api",
    "pyro-ppl", "rich", "sparse", "tensorboard", "tensorboard-data-server",
)  # fmt: skip

DIFFERENT = {
    # scvi-tools goes on reading a collection that it has built anew in the same place: refused here.
    "test_annbatch_setup_scvi",
    # Refusals of annbatch's that are lifted here: several workers with any sampler.
    "test_multiple_workers_not_supported",
    "test_sequential_with_multiple_workers_raises",
    "test_replacement_with_multiple_workers_raises",
    "test_drop_last_false_with_multiple_workers_raises",
    # A rank gets whole load requests of one common order, not a range of rows, or rows of a request by themselves.
    "test_distributed_ranks_draw_independently",
    "test_distributed_queries_leave_the_shard_alone",
    "test_enforce_equal_batches_all_ranks_same_count",
    "test_enforce_equal_batches_per_rank_count",
    "test_shards_are_disjoint_and_cover_full_dataset",
    # The short run at the end of the rows is not always the last of a pass: so each row is left out as often.
    "test_batch_sizes_match_expected_pattern",
    # Rows are drawn alike, not starts of chunks.
    "test_runs_are_drawn_in_proportion_to_length",
    # annbatch sets anndata's zarr_write_format where it is imported, or anndata 0.12 warns; it is left alone here.
    "test_load_all_aligned_backs_arrays_and_skips_the_rest",
    # Names annbatch's warning by its words.
    "test_add_adata_warns_about_additional_aligned_elems",
    "test_use_collection_warns_about_additional_aligned_elems",
    "test_add_adatas_warns_exactly_once_about_each_additional_aligned_elem",
    # scDataset's, of errors by their words.
    "test_empty_labels_raises_error",
    "test_indexable_without_len_raises_error",
    "test_invalid_batch_size",
    "test_invalid_fetch_factor",
    "test_invalid_input_type",
    "test_key_access_without_names",
    "test_key_not_found_with_names",
    "test_labels_shorter_than_indices_raises_error",
    "test_no_indexables_raises_error",
    "test_weighted_mismatched_length_raises_error",
    "test_weights_mismatch_with_data_raises_error",
    # Names that are private there.
    "TestDeepSizeof",
    "test_fetch_transform_changes_size_correctly",
    "test_multiindexable_batch_size_matches_estimate",
    "test_numpy_batch_size_matches_estimate",
    "test_worker_distribution_path",
    "test_worker_info_path",
    "test_worker_remainder_distribution",
    # A report goes to the log instead of the screen.
    "test_verbose_mode",
    # Examples in docstrings are run with names that tests/project/test_docs.py gives.
    "test_auto_config_module_docstrings",
    "test_multiindexable_module_docstrings",
    "test_strategy_module_docstrings",
    # Ranks get equal numbers of batches: 5 batches do not go round among 8.
    "test_len_exact_matches_iteration_count_ddp",
    # Compare the mean of one batch of random numbers with that of all: they fail with scDataset itself now and then.
    "test_fetch_callback",
    "test_fetch_transform",
}


def source(peer: str) -> Path:
    """The peer's sdist, unpacked, without its package."""
    name = f"{peer.replace('-', '_')}-{VERSIONS[peer]}"
    if not (FOLDER / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", FOLDER, f"{peer}=={VERSIONS[peer]}"], check=True)
        with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
        shutil.rmtree(FOLDER / name / "src")
        if peer == "annbatch" and sys.version_info < (3, 12):  # a warning that pandas 2 does not have
            config = FOLDER / name / "pyproject.toml"
            config.write_text(re.sub(r".*Pandas4Warning.*\n", "", config.read_text()))
    return FOLDER / name


def run(peer: str, arguments: list[str]) -> set[str]:
    """The names of the tests that fail, with their parameters."""
    paths = [ROOT / "tests/peers/alias", ROOT]
    if peer == "scvi-tools":
        site = FOLDER / "site"
        if not site.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
            subprocess.run([*pip, "--target", site, *SCVI], check=True)
        paths.append(site)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "DASK_SCHEDULER": "synchronous"}
    if peer == "annbatch":
        environment["ANNBATCH_INTERNALS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *TESTS[peer], *arguments],
        cwd=source(peer),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    print(done.stdout, done.stderr[-4000:])  # the reason of each failure: the one that is no expected one is wanted
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE)
    if peer == "scvi-tools" and not arguments:
        done = subprocess.run([*command, *OURS], cwd=ROOT, env=environment, check=False)
        failed += ["tests/peers/test_scvi.py"] if done.returncode else []
    return set(failed)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = run(sys.argv[1], sys.argv[2:])
    unexpected = {name for name in failed if not DIFFERENT & set(name.split("[")[0].split("::"))}
    sys.exit(f"tests that should pass: {sorted(unexpected)}" if unexpected else 0)
