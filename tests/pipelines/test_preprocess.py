"""pipelines/preprocess.py: a build from one YAML file."""

import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
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
        ({"cluster": {"kind": "kubernetes"}}, "a kubernetes cluster needs dask-kubernetes"),
        ({"cluster": {"kind": "ssh"}}, "a ssh cluster needs asyncssh"),
        ({"files": ["none/*.h5ad"]}, "none/*.h5ad matches no file"),
        ({"cluster": {"kind": "fake", "workers": [4, 2]}}, "workers is [4, 2]; it must be a number such as 8, or two"),
        ({"cluster": {"kind": "fake", "workers": 0}}, "workers is 0; it must be"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, h5ad_pair, more, words, monkeypatch):
    monkeypatch.setitem(preprocess.DEPLOYERS, "fake", ("distributed", "LocalCluster"))
    monkeypatch.setitem(sys.modules, "asyncssh", None)  # as if it were not there
    if (cluster := more.get("cluster", {})).get("kind") == "fake":
        cluster["options"] = THREADS
        words = words.replace("ssh, slurm, kubernetes", "ssh, slurm, kubernetes, fake")
    monkeypatch.setattr(sys, "argv", ["preprocess.py", str(config(tmp_path, h5ad_pair, **more))])
    with pytest.raises(SystemExit, match=re.escape(words)):
        preprocess.main()


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
