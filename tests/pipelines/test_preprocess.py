"""pipelines/preprocess.py: a build from one YAML file."""

import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import anndata as ad
import dask
import pytest
import yaml

from annbatch_dask import DatasetCollection

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))

import preprocess  # noqa: E402

THREADS = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
"""Of a cluster whose workers are threads of this process."""


def run(*args):
    return subprocess.run(
        [sys.executable, PIPELINES / "preprocess.py", *args], capture_output=True, text=True, check=False, timeout=500
    )


def config(folder, pair, **more):
    values = {"files": [str(pair[0].parent / "*.h5ad")], "output": str(folder / "o.zarr"), "options": {"seed": 0}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | more))
    return path


def test_cells_are_chosen_in_the_file(tmp_path, h5ad_pair, monkeypatch, capsys):
    qc = {"min_genes": 12, "max_fraction": {"some": 0.5}, "gene_sets": {"some": "gene_1"}}
    options = {"where": {"*.h5ad": "cell_type != 'B'"}, "qc": qc}
    path = config(tmp_path, h5ad_pair, options=options)
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(path), "--plan"])
    assert preprocess.main() == 0
    said = capsys.readouterr().out
    assert "where drops" in said
    assert "min_genes, max_fraction/some: X is read once more" in said


def test_a_build_and_its_plan(tmp_path, h5ad_pair, monkeypatch, capsys):
    path = config(tmp_path, h5ad_pair, cluster={"kind": "local"})
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(path), "--plan"])
    assert preprocess.main() == 0
    assert "500 cells x 58 genes from 2 sources" in capsys.readouterr().out
    assert not (tmp_path / "o.zarr").exists()
    done = run(path)
    assert "500 cells x 58 genes, datasets: 1" in done.stdout, done.stderr
    assert DatasetCollection(tmp_path / "o.zarr").verify(against=h5ad_pair).ok


def test_paths_hold_variables_and_folders_at_any_depth(tmp_path, h5ad_pair, monkeypatch, capsys, call):
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    for path, folder in zip(h5ad_pair, ("in", "in/deep/er"), strict=True):
        shutil.copy(path, tmp_path / folder)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = config(tmp_path, h5ad_pair, files=["$HERE/in/**/*.h5ad"], output="~/${HERE}/o.zarr", scratch=None)
    found = preprocess.read(path)
    assert found["output"] == f"{tmp_path}/{tmp_path}/o.zarr"
    assert len(preprocess.expand(found["files"])) == 2
    assert call(preprocess, path, "--plan") == 0
    assert "from 2 sources" in capsys.readouterr().out


def test_a_plan_takes_the_options_of_a_build(tmp_path, h5ad_pair, call, capsys):
    assert call(preprocess, config(tmp_path, h5ad_pair, options={"seed": 3, "progress": False}), "--plan") == 0
    assert "seed 3" in capsys.readouterr().out


def test_options_that_a_cluster_does_not_take_are_a_line(tmp_path, h5ad_pair, call, monkeypatch):
    def refuse(**options):
        raise RuntimeError("Nanny failed to start.") from TypeError(f"Worker got an unexpected {min(options)}")

    monkeypatch.setattr(preprocess, "LocalCluster", refuse)
    cluster = {"kind": "local", "options": {"foo": 1}}
    with pytest.raises(
        SystemExit, match="a local cluster does not start with these options: Worker got an unexp.* foo"
    ):
        call(preprocess, config(tmp_path, h5ad_pair, cluster=cluster))


def test_debug_shows_the_traceback(tmp_path, h5ad_pair, call):
    with pytest.raises(ValueError, match="mode is 'appendd'"):
        call(preprocess, config(tmp_path, h5ad_pair, options={"mode": "appendd"}), "--debug")


def test_rules_for_names_of_genes_stand_in_the_file(tmp_path, h5ad_pair, monkeypatch, capsys):
    genes = [ad.read_h5ad(path, backed="r").var_names for path in h5ad_pair]
    (tmp_path / "map.csv").write_text(f"alias,id\n{genes[0][0]},{genes[0][1]}\n")
    names = {"gene_map": str(tmp_path / "map.csv"), "on_duplicate_gene": "sum", "var_key": {"*.h5ad": ""}}
    path = config(tmp_path, h5ad_pair, options={"seed": 0, "strip_versions": True, **names})
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(path), "--plan"])
    assert preprocess.main() == 0
    assert "Ensembl versions stripped; gene_map" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cluster": {"kind": "abacus"}}, "cluster kind 'abacus' is none of local, scheduler, ssh, slurm, kubernetes"),
        ({"cluster": {"kind": "kubernetes", "workers": 2}}, "a kubernetes cluster needs dask-kubernetes"),
        ({"cluster": {"kind": "ssh"}}, "a ssh cluster needs asyncssh"),
        ({"files": ["none/*.h5ad"]}, "none/*.h5ad matches no file"),
        ({"cluster": {"kind": "fake", "workers": [4, 2]}}, "workers is [4, 2]; it must be a number such as 8, or two"),
        ({"cluster": {"kind": "fake", "workers": 0}}, "workers is 0; it must be"),
        ({"cluster": {"kind": "fake", "workers": True}}, "workers is True; it must be"),
        ({"scrach": "/fast"}, "config.yaml: 'scrach' is not known; did you mean 'scratch'?"),
        ({"optoins": {"seed": 1}}, "config.yaml: 'optoins' is not known; did you mean 'options'?"),
        ({"options": {"seeed": 1}}, "options: 'seeed' is not known; did you mean 'seed'?"),
        ({"options": {"scratch": "/fast"}}, "options: 'scratch' is not known; it stands beside them"),
        ({"options": {"xyz": 1}}, "options: 'xyz' is not known; there may be seed, dataset_size, "),
        ({"options": ["seed"]}, "options: ['seed'] is no mapping; give names and values, such as seed: ..."),
        ({"cluster": "slurm"}, "cluster: 'slurm' is no mapping; give names and values, such as kind: ..."),
        ({"cluster": {"kind": "local", "nworkers": 2}}, "cluster: 'nworkers' is not known; did you mean 'workers'?"),
        ({"cluster": {"kind": "slurm"}}, "cluster of kind slurm: there is no 'workers'; add it"),
        ({"cluster": {"kind": "ssh", "workers": 2}}, "cluster of kind ssh: 'workers' is not known; there may be kind,"),
        ({"cluster": {"kind": "scheduler"}}, "options of a scheduler: there is no 'address'; add it"),
        ({"options": {"counts": "raw/X", "elements": ["obs"]}}, "has no raw/X, which counts names"),
        ({"files": 5}, "files is 5; it must be text, such as [data/*.h5ad]"),
        ({"files": [None]}, "files is None; it must be text"),
        ({"files": []}, "files is []; it must be text"),
        ({"output": None}, "output is None; it must be text"),
        ({"scratch": "/fast/$NOT_SET_HERE"}, "'/fast/$NOT_SET_HERE', and $NOT_SET_HERE is not set in the environment"),
        ({"options": {"mode": "appendd"}}, "mode is 'appendd' and genes 'collection'; give 'extend', "),
        ({"options": {"elements": "obs"}}, "elements is one string, 'obs'; give a list of names"),
        ({"options": {"shuffle": "no"}}, "shuffle is the text 'no'; give True or False"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, h5ad_pair, more, words, monkeypatch):
    monkeypatch.setitem(preprocess.DEPLOYERS, "fake", ("distributed", "LocalCluster"))
    monkeypatch.setitem(sys.modules, "asyncssh", None)  # as if it were not there
    if "fake" in str(more):
        more["cluster"]["options"] = THREADS
        words = words.replace("ssh, slurm, kubernetes", "ssh, slurm, kubernetes, fake")
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(config(tmp_path, h5ad_pair, **more))])
    with pytest.raises(SystemExit, match=re.escape(words)):
        preprocess.main()


@pytest.mark.parametrize("text", ["", "- a", "files: [a.h5ad]", "files: [a.h5ad\noutput: b.zarr", None])
def test_a_file_that_describes_no_build_is_refused_in_a_line(tmp_path, text, call):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="^preprocess: "):
        call(preprocess, path)


def test_a_scheduler_that_does_not_answer_is_named(tmp_path, h5ad_pair, call, monkeypatch):
    def refuse(address):
        raise OSError(f"timed out after 30 s: {address}")

    monkeypatch.setattr(preprocess, "Client", refuse)
    cluster = {"kind": "scheduler", "options": {"address": "tcp://there:1"}}
    with pytest.raises(SystemExit, match="no scheduler answers at tcp://there:1 .*check the address"):
        call(preprocess, config(tmp_path, h5ad_pair, cluster=cluster))


def test_a_plan_is_made_for_the_memory_of_the_cluster(tmp_path, h5ad_pair, call, capsys):
    options = {"memory_limit": "5MB", "processes": False, "dashboard_address": "127.0.0.1:0"}
    cluster = {"kind": "local", "workers": 1, "options": options}
    with (
        dask.config.set({"distributed.worker.memory.pause": False}),
        pytest.raises(SystemExit, match="largest scatter task needs .* start workers with more memory"),
    ):
        call(preprocess, config(tmp_path, h5ad_pair, cluster=cluster), "--plan")


def test_a_plan_needs_no_package_of_the_cluster(tmp_path, h5ad_pair, call, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    assert call(preprocess, config(tmp_path, h5ad_pair, cluster={"kind": "slurm", "workers": 2}), "--plan") == 0
    assert "500 cells x 58 genes" in capsys.readouterr().out


def test_a_local_cluster_has_as_many_workers_as_the_file_says(monkeypatch):
    asked = {}
    monkeypatch.setattr(preprocess, "LocalCluster", lambda **options: nullcontext(asked.update(options)))
    monkeypatch.setattr(preprocess, "Client", nullcontext)
    for cluster in ({"kind": "local", "workers": [1, 3], "options": {"memory_limit": "4GB"}}, {"kind": "local"}):
        with ExitStack() as stack:
            assert preprocess.connect(cluster, stack) is None
    assert asked == {"n_workers": 3, "memory_limit": "4GB", "preload": ["annbatch_dask.preload"]}


@pytest.mark.parametrize("path", sorted((PIPELINES / "clusters").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_examples_are_whole(path):
    values = yaml.safe_load(path.read_text())
    assert values.keys() <= {"files", "output", "scratch", "performance_report", "options", "cluster"}
    assert values["cluster"]["kind"] == path.stem
    assert values["cluster"].keys() <= {"kind", "workers", "options"}


def test_a_slurm_job_is_what_the_file_says():
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    done = run(PIPELINES / "clusters/slurm.yaml", "--job-script")
    assert done.returncode == 0, done.stderr
    said = ("-p regular", "--requeue", "--mem=15G")
    worker = (
        "--lifetime 7h",
        "--lifetime-stagger 30m",
        "--preload annbatch_dask.etl.preload",
        "--local-directory /tmp",
    )
    for line in (*(f"#SBATCH {text}" for text in said), *worker):
        assert line in done.stdout


@pytest.mark.parametrize("workers", [1, [0, 2]])
def test_workers_are_asked_for_as_long_as_there_is_work(tmp_path, h5ad_pair, workers, monkeypatch):
    monkeypatch.setitem(preprocess.DEPLOYERS, "fake", ("distributed", "LocalCluster"))
    cluster = {"kind": "fake", "workers": workers, "options": THREADS}
    path = config(tmp_path, h5ad_pair, cluster=cluster, performance_report=str(tmp_path / "report.html"))
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(path)])
    assert preprocess.main() == 0
    assert DatasetCollection(tmp_path / "o.zarr", mode="r").n_obs == 500
    assert "scatter" in (tmp_path / "report.html").read_text()
