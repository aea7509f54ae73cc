import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dask
import h5py
import numpy as np
import pandas as pd
import pytest
from distributed import LocalCluster

from annbatch_dask import DatasetCollection, __version__
from annbatch_dask.cli import main
from annbatch_dask.errors import WorkersDiedError
from annbatch_dask.testing import make_adata

COMMANDS = ["shuffle", "plan", "info", "report", "stats", "stream", "mixing"]


@pytest.fixture(scope="module")
def collection(h5ad_pair, tmp_path_factory):
    """One collection, made by the command line in this process."""
    path = tmp_path_factory.mktemp("cli") / "atlas.zarr"
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", path, "--dataset-size", "200", "--seed", 3, "--no-progress") == 0
    return path


def run(*args):
    return main([str(a) for a in args])


def error_line(capsys):
    """The one line an error is."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("annbatch-dask: error: ")
    assert err.count("\n") == 1
    return err


def test_shuffle_writes_a_collection(collection):
    found = DatasetCollection(collection, mode="r")
    assert (len(found), found.n_obs, found.manifest.seed) == (3, 500, 3)


def test_shuffle_says_what_it_wrote_and_shows_progress(h5ad_pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", tmp_path / "out.zarr") == 0
    out, err = capsys.readouterr()
    assert re.search(r"out\.zarr: 500 cells x \d+ genes in 1 dataset, [\d.]+ s\n$", out)
    assert "scatter" in err
    assert "gather" in err


def test_stats_are_written_as_a_table_or_as_a_list_of_genes(collection, h5ad_pair, tmp_path, capsys):
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", tmp_path / "b.zarr", "--stats-by", "cell_type", "--no-progress") == 0
        capsys.readouterr()
        for path in (collection, tmp_path / "b.zarr"):
            assert run("stats", path, "-o", tmp_path / "t.csv", "--by", "cell_type") == 0
            assert re.search(r"t\.csv: \d+ genes by cell_type, of 500 cells\n$", capsys.readouterr().out)
            table = pd.read_csv(tmp_path / "t.csv", index_col=[0, 1])
            want = DatasetCollection(path).gene_stats("cell_type")
            assert list(table.columns) == list(want.columns)
            np.testing.assert_allclose(table.to_numpy(), want.to_numpy())
            assert run("stats", path, "-o", tmp_path / "g.txt", "--highly-variable", 7) == 0
            assert "7 highly variable genes, seurat" in capsys.readouterr().out
        names = (tmp_path / "g.txt").read_text().split()
        assert names == list(DatasetCollection(path).highly_variable(7))
        assert run("shuffle", *h5ad_pair, "-o", tmp_path / "c.zarr", "--var-subset", tmp_path / "g.txt") == 0
    assert set(DatasetCollection(tmp_path / "c.zarr").var.index) == set(names)


def test_cells_are_chosen_by_obs_and_by_counts(h5ad_pair, tmp_path):
    options = ["--where", "cell_type != 'B'", "--min-counts", "12", "--max-genes", "40", "--gene-set", "some=gene_1"]
    options += ["--max-fraction", "some=0.5"]
    assert main(["shuffle", *map(str, h5ad_pair), "-o", str(tmp_path / "a.zarr"), *options, "--no-progress"]) == 0
    collection = DatasetCollection(tmp_path / "a.zarr")
    qc = {"min_counts": 12, "max_genes": 40, "max_fraction": {"some": 0.5}, "gene_sets": {"some": "gene_1"}}
    assert collection.manifest.builds[-1].qc == qc
    assert {s.where for s in collection.manifest.sources} == {"cell_type != 'B'"}
    assert 0 < collection.n_obs < 500


def test_the_matrix_of_some_files_is_chosen(tmp_path, capsys):
    for name in ("a", "b"):
        adata = make_adata(20, ["x", "y", "z"], seed=0)
        adata.layers["counts"] = adata.X.copy()
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("a", "b")]
    for options, words in (
        (["--counts", "layers/counts"], "layers/counts in 2 sources: whole"),
        (["--counts", "*b.h5ad=layers/counts"], "X in 1 source: whole numbers; layers/counts in 1 source: whole"),
    ):
        assert run("plan", *files, *options) == 0
        assert words in capsys.readouterr().out
    assert run("plan", *files, "--counts", "X", "--counts", "*b.h5ad=X") == 1
    assert "--counts X: give one name for all files, or PATTERN=NAME" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--where", "nope == 1"], ["--min-counts", "1e9"], ["--gene-set", "mito=MT-"]])
def test_choices_that_keep_nothing_are_one_line(h5ad_pair, tmp_path, capsys, option):
    if option[0] == "--gene-set":
        option = [*option, "--max-fraction", "mito=0.1"]
    assert main(["shuffle", *map(str, h5ad_pair), "-o", str(tmp_path / "a.zarr"), *option, "--no-progress"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_no_shuffle_keeps_the_order(h5ad_pair, tmp_path):
    target = tmp_path / "out.zarr"
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", target, "--no-shuffle", "--no-progress") == 0
    names = list(DatasetCollection(target, mode="r").obs().index)
    assert names[:300] == [f"s0_{i}" for i in range(300)]


def test_var_subset_is_a_file_of_names(h5ad_pair, tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("gene_1\ngene_2\n\ngene_3 \n")
    target = tmp_path / "out.zarr"
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", target, "--var-subset", genes, "--no-progress") == 0
    assert set(DatasetCollection(target, mode="r").var.index) <= {"gene_1", "gene_2", "gene_3"}


def test_shuffle_on_a_scheduler(h5ad_pair, tmp_path, collection):
    target = tmp_path / "out.zarr"
    options = {"threads_per_worker": 2, "processes": False, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, **options) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tcp://")
        options = ("--dataset-size", 200, "--seed", 3, "--scheduler", address, "--no-progress")
        assert run("shuffle", *h5ad_pair, "-o", target, *options) == 0
    assert contents(target) == contents(collection)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shuffle_with_a_number_of_workers(h5ad_pair, tmp_path, collection):
    """The installed way: a process of its own, with a cluster of its own."""
    target = tmp_path / "out.zarr"
    command = [sys.executable, "-m", "annbatch_dask.cli", "shuffle", *map(str, h5ad_pair), "-o", str(target)]
    options = ["--dataset-size", "200", "--seed", "3", "--n-workers", "1", "--memory-limit", "1GB"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "500 cells" in done.stdout
    assert contents(target) == contents(collection)


def test_plan_prints_and_leaves_nothing(h5ad_pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plan", *h5ad_pair, "--dataset-size", "200", "--seed", 0) == 0
    out = capsys.readouterr().out
    assert "scatter" in out
    assert "gather" in out
    assert "500" in out
    assert not list(tmp_path.iterdir())


def test_info(collection, h5ad_pair, capsys):
    assert run("info", collection) == 0
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["datasets"] == "3"
    assert lines["cells"] == "500"
    assert lines["build"].startswith("create, 2 sources, swap-or-not")
    assert lines["build"].endswith("seed 3")
    assert "csr_matrix, uint8 data" in lines["X"]
    assert "(sources: float32)" in lines["X"]
    assert lines["source"] == f"{h5ad_pair[1]} (200 cells)"
    assert re.fullmatch(r"[\d.]+ kB", lines["on disk"])


def test_report_writes_a_page(collection, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert run("report", collection, "-o", page) == 0
    assert re.fullmatch(rf"{page}: 500 cells, [\d.]+ kB\n", capsys.readouterr().out)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("dense", [[], ["--dense"]], ids=["csr", "dense"])
def test_stream(collection, capsys, dense):
    sizes = ["--batch-size", 50, "--chunk-size", 10, "--preload-nchunks", 10]
    assert run("stream", collection, *sizes, "--by", "cell_type", "--epochs", 2, *dense) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "500 cells in" in line
        assert "10 batches with 4.0 distinct cell_type" in line
        share = float(re.search(r"([\d.]+) of the ideal", line)[1])
        assert 0.95 < share < 1.05


def test_stream_chooses_a_column(collection, capsys):
    assert run("stream", collection, "--batch-size", 32, "--chunk-size", 16, "--preload-nchunks", 8) == 0
    assert "distinct cell_type" in capsys.readouterr().out


def test_stream_refuses_sizes_that_do_not_fit(collection, capsys):
    sizes = ["--batch-size", 50, "--chunk-size", 16, "--preload-nchunks", 8]
    assert run("stream", collection, *sizes) == 1
    assert "divisible by batch_size" in error_line(capsys)


def test_stream_refuses_an_unknown_column(collection, capsys):
    assert run("stream", collection, "--by", "nonsense") == 1
    line = error_line(capsys)
    assert "nonsense" in line
    assert "cell_type" in line


def test_mixing_reads_no_data_and_draws(collection, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    bare = tmp_path / "bare.zarr"
    shutil.copytree(collection, bare, ignore=lambda folder, names: {"c"} if "/X/" in folder else ())
    sizes = ["--batch-size", 50, "--chunk-size", 10, "--preload-nchunks", 10, "--by", "cell_type"]
    assert run("mixing", bare, *sizes, "--plot", tmp_path / "m.png") == 0
    first, second = capsys.readouterr().out.splitlines()
    found = re.search(
        r"10 batches with 4.0 distinct cell_type .* ([\d.]+) of the .*: ([\d.]+) of ([\d.]+) bits$", first
    )
    share, mean, ideal = map(float, found.groups())
    assert 0.95 < share < 1.05
    assert share == pytest.approx(mean / ideal, abs=1e-3)
    assert second == f"picture: {tmp_path / 'm.png'}"
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_mixing_agrees_with_what_is_streamed(collection, capsys):
    sizes = ["--batch-size", 50, "--chunk-size", 10, "--preload-nchunks", 10, "--seed", 7]
    assert run("mixing", collection, *sizes) == run("stream", collection, *sizes) == 0
    shares = re.findall(r"([\d.]+) of the ideal", capsys.readouterr().out)
    assert len(shares) == 2
    assert shares[0] == shares[1]


def test_mixing_refuses_a_picture_it_cannot_draw(collection, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sizes = ["--batch-size", 50, "--chunk-size", 10, "--preload-nchunks", 10]
    assert run("mixing", collection, *sizes, "--plot", tmp_path / "m.docx") == 1
    assert "docx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("mixing", collection, *sizes, "--plot", tmp_path / "m.png") == 1
    printed = capsys.readouterr()
    assert "pip install matplotlib" in printed.err
    assert not printed.out  # before any work


def test_a_missing_file(tmp_path, capsys):
    target = tmp_path / "out.zarr"
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", tmp_path / "absent.h5ad", "-o", target) == 1
    assert "absent.h5ad" in error_line(capsys)


def test_a_missing_gene_list(h5ad_pair, tmp_path, capsys):
    assert run("plan", *h5ad_pair, "--var-subset", tmp_path / "absent.txt") == 1
    assert "absent.txt" in error_line(capsys)


@pytest.mark.parametrize("command", [["report", "-o"], ["stats", "-o"], ["mixing", "--plot"]])
def test_an_output_without_a_folder_is_refused_before_the_work(command, tmp_path, capsys, monkeypatch):
    for module in ("look", "stream"):
        name = f"annbatch_dask.cli.{module}.open_collection"
        monkeypatch.setattr(name, lambda _: pytest.fail("the work was begun"))
    assert run(command[0], "o.zarr", command[1], tmp_path / "absent" / "x.csv") == 1
    assert f"there is no folder {tmp_path / 'absent'}; make it" in error_line(capsys)
    assert run(command[0], "o.zarr", command[1], tmp_path) == 1
    assert "cannot be written: it is a folder; give the path of a file" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--highly-variable", 5, "--by", "donor"], "--by donor is of the table; .*give --batch-key donor"),
        (["--batch-key", "donor"], "give --highly-variable N too, or --by"),
        (["--flavor", "seurat_v3"], "give --highly-variable N too, or --by"),
    ],
)
def test_options_of_a_list_and_of_a_table_of_genes_are_not_mixed(options, words, tmp_path, capsys):
    assert run("stats", "o.zarr", "-o", tmp_path / "x.csv", *options) == 1
    assert re.search(words, error_line(capsys))


@pytest.mark.parametrize("command", ["stream", "mixing"])
def test_a_seed_below_zero_is_refused(command, collection, capsys):
    assert run(command, collection, "--seed", -1) == 1
    assert "seed is -1; it must be 0 or more" in error_line(capsys)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_who_reads_no_further_is_no_error(collection, options):
    command = [sys.executable, "-m", "annbatch_dask.cli", "info", str(collection), *options]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as out:
        found = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 141
    assert found.stderr == ""


def test_names_that_a_terminal_cannot_show(h5ad_pair, tmp_path):
    path = shutil.copy(h5ad_pair[0], tmp_path / "ü.h5ad")
    command = [sys.executable, "-m", "annbatch_dask.cli", "plan", path, tmp_path / "ä.h5ad"]
    found = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert found.returncode == 1
    assert rb"\xe4.h5ad does not exist" in found.stderr


@pytest.mark.parametrize("command", ["info", "report", "stream", "mixing"])
def test_no_collection_there(command, tmp_path, capsys):
    assert run(command, tmp_path / "absent.zarr") == 1
    assert "absent.zarr" in error_line(capsys)
    assert not (tmp_path / "absent.zarr").exists()


def test_an_output_that_is_no_collection_is_left_alone(h5ad_pair, tmp_path, capsys):
    target = tmp_path / "precious.zarr"
    shutil.copytree(h5ad_pair[0].parent, target)
    before = contents(target)
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", target) == 1
    assert "precious.zarr" in error_line(capsys)
    assert contents(target) == before


def test_a_value_that_the_library_refuses(h5ad_pair, tmp_path, capsys):
    with dask.config.set(scheduler="synchronous"):
        assert run("shuffle", *h5ad_pair, "-o", tmp_path / "o.zarr", "--elements", "nonsense") == 1
    assert "nonsense" in error_line(capsys)


@pytest.mark.parametrize("command", [("info", "zzz://host/a.zarr"), ("shuffle", "zzz://host/a.h5ad", "-o", "o.zarr")])
def test_a_protocol_that_there_is_not(command, capsys):
    assert run(*command) == 1
    assert re.search(r"zzz://host/a\.\w+: fsspec knows no zzz://; correct the path, or install", error_line(capsys))


def test_warnings_and_errors_are_no_output_where_there_is_no_place_for_them(tmp_path, capsys, monkeypatch):
    """As after ``2>&-``; print would take standard output."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run("info", tmp_path / "absent") == 1
    assert capsys.readouterr().out == ""


def test_gc_of_a_path_that_holds_nothing(tmp_path, capsys):
    assert run("gc", tmp_path / "absent.zarr") == 1
    assert "there is no collection at" in error_line(capsys)


def test_a_share_that_is_no_number(capsys):
    with pytest.raises(SystemExit):
        run("shuffle", "a.h5ad", "-o", "o.zarr", "--max-fraction", "mito=0,2")
    assert "'mito=0,2' is not SET=SHARE, such as mito=0.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://bucket/a.h5ad", "s3fs", "s3"), ("https://host/a.h5ad", "aiohttp", "http")]
)
def test_a_package_that_is_not_installed(url, package, extra, tmp_path):
    """In a process of its own: fsspec keeps what it has imported."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; from annbatch_dask.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "shuffle", url, "-o", str(tmp_path / "o.zarr"), "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        rf'annbatch-dask: error: {url} needs .* \(.*{package}.*\): pip install "annbatch-dask\[{extra}\]".*\n',
        done.stderr,
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("obs"), "KeyError: 'obs' (--debug shows where)\n"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines (--debug shows where)\n"),
        (PermissionError(13, "Permission denied", "/out"), "[Errno 13] Permission denied: '/out'\n"),
        (WorkersDiedError("8 workers with a.h5ad died"), "8 workers with a.h5ad died\n"),
    ],
)
def test_every_error_is_one_line_and_debug_shows_its_traceback(collection, capsys, monkeypatch, error, text):
    def fails(_collection):
        raise error

    monkeypatch.setattr("annbatch_dask.cli.look._facts", fails)
    assert run("info", collection) == 1
    assert error_line(capsys) == f"annbatch-dask: error: {text}"
    with pytest.raises(type(error)):
        run("info", collection, "--debug")


def test_a_build_that_fails_on_workers_of_its_own_is_one_line(h5ad_pair, tmp_path):
    """None of what they meet, and try again, is shown beside it."""
    bad = tmp_path / "bad.h5ad"
    shutil.copy(h5ad_pair[0], bad)
    with h5py.File(bad, "r+") as f:
        f["X/indices"][5] = 999
    command = [sys.executable, "-m", "annbatch_dask.cli", "shuffle", str(bad), "-o", str(tmp_path / "o.zarr")]
    done = subprocess.run([*command, "--n-workers", "1"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"annbatch-dask: error: .*999.*bad.h5ad, rows 0 to 300\n", done.stderr)


def test_a_scheduler_that_does_not_answer(h5ad_pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("annbatch_dask.engines.local_cluster.CONNECT_TIMEOUT_S", 0.5)
    assert run("shuffle", *h5ad_pair, "-o", tmp_path / "out.zarr", "--scheduler", "tcp://127.0.0.1:9") == 1
    assert "tcp://127.0.0.1:9" in error_line(capsys)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        run("info", tmp_path / "absent.zarr", "--debug")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["shuffle", "a.h5ad"],
        ["stream", "x.zarr", "--batch-size", "0"],
        ["stream", "x.zarr", "--batch-size", "many"],
        ["plan", "a.h5ad", "--memory-limit", "much"],
        ["shuffle", "a.h5ad", "-o", "x.zarr", "--n-workers", "2", "--scheduler", "tcp://here:8786"],
    ],
)
def test_wrong_usage_exits_with_2(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "usage: annbatch-dask" in said
    assert "_" not in said.splitlines()[-1]  # no name of a function


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"annbatch-dask {command} " in capsys.readouterr().out.partition("example")[2]


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"annbatch-dask {__version__}\n"


def test_ctrl_c_exits_with_130(collection, capsys, monkeypatch):
    def interrupted(_collection):
        raise KeyboardInterrupt

    monkeypatch.setattr("annbatch_dask.cli.look._facts", interrupted)
    assert run("info", collection) == 130
    assert "interrupted" in error_line(capsys)


# --- for scripts ---------------------------------------------------------------------------------------------------


def said(capsys):
    found = json.loads(capsys.readouterr().out)
    assert found.pop("annbatch_dask") == __version__
    return found.pop("command"), found


def test_a_plan_as_json(h5ad_pair, capsys):
    assert run("plan", *h5ad_pair, "--dataset-size", "200", "--seed", 0, "--json") == 0
    command, found = said(capsys)
    assert command == "plan"
    assert (found["n_obs"], found["n_datasets"], found["max_dataset_n_obs"]) == (500, 3, 200)
    assert found["n_tasks"]["gather"] == 3
    assert [s["path"] for s in found["sources"]] == [str(p) for p in h5ad_pair]
    assert all(type(n) is int for n in (found["n_bytes_read"], found["task_nbytes"], *found["peak_nbytes"].values()))
    assert found["words"]["order"][0].endswith("seed 0")
    assert "X" in found["elements"]


def test_info_as_json(collection, h5ad_pair, capsys):
    assert run("info", collection, "--json") == 0
    command, found = said(capsys)
    manifest = DatasetCollection(collection, mode="r").manifest
    assert (command, found["n_obs"], found["n_datasets"]) == ("info", 500, 3)
    assert found["n_bytes"] == sum(p.stat().st_size for p in collection.rglob("*") if p.is_file())
    assert [d["n_bytes"] for d in found["datasets"]] == [d.n_bytes for d in manifest.datasets]
    assert [(b["seed"], b["plan"]) for b in found["builds"]] == [(3, manifest.builds[0].plan)]
    assert [s["path"] for s in found["sources"]] == [str(p) for p in h5ad_pair]


def test_verify_as_json(collection, h5ad_pair, tmp_path, capsys):
    assert run("verify", collection, "--against", *h5ad_pair, "--json") == 0
    command, found = said(capsys)
    assert (command, found["ok"], found["n_obs"], found["problems"]) == ("verify", True, 500, [])
    assert found["against"] == [str(p) for p in h5ad_pair]
    copy = shutil.copytree(collection, tmp_path / "o.zarr")
    (copy / "dataset_1" / "X" / "data" / "c" / "0").write_bytes(b"")
    assert run("verify", copy, "--json") == 1
    out, err = capsys.readouterr()
    assert err.startswith("annbatch-dask: error: ")
    (problem, *_) = json.loads(out)["problems"]
    assert "dataset_1" in problem["where"]


def test_status_as_json(collection, capsys):
    assert run("status", collection, "--json") == 0
    command, found = said(capsys)
    assert (command, found["state"], found["builds"], found["n_obs"]) == ("status", "idle", [], 500)
    assert found["last"][0]["plan"] == DatasetCollection(collection, mode="r").manifest.builds[0].plan


def test_the_page_says_every_field(collection, h5ad_pair, capsys):
    """The one description of the documents."""
    page = (Path(__file__).parents[2] / "docs/how-to/watch-a-build.md").read_text()
    for command in (
        ["plan", *h5ad_pair, "--seed", 0],
        ["info", collection],
        ["verify", collection],
        ["status", collection],
    ):
        assert run(*command, "--json") == 0
        _, found = said(capsys)
        assert [name for name in found if f"`{name}`" not in page] == [], command


@pytest.mark.parametrize("command", ["info", "versions", "status", "mixing"])
def test_output_that_cannot_be_written(collection, capsys, monkeypatch, command):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(command, collection) == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert "error: the output cannot be written: No space left on device; make room" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["stats"], ["stats", "--highly-variable", "3"]])
def test_a_page_that_cannot_be_written(collection, capsys, command):
    name, *options = command
    assert run(name, collection, "-o", "/dev/full", *options) == 1
    assert "error: /dev/full cannot be written: " in capsys.readouterr().err
