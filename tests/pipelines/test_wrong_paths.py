"""Scripts that train say what is wrong in a line, and before they train."""

import importlib

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

COLUMN = {"train_classifier": ["cell_type"], "train_vae": ["cell_type"], "pretrain_tokens": []}


@pytest.mark.parametrize("name", COLUMN)
def test_a_collection_that_is_not_there_is_a_line(name, tmp_path, call):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit, match=f"^{name}: there is no collection at .*; check the path"):
        call(script, tmp_path / "absent.zarr", *COLUMN[name])


@pytest.mark.parametrize("name", ["train_classifier", "train_vae"])
def test_a_column_that_is_not_there_is_a_line(name, atlas, call):
    with pytest.raises(SystemExit, match=f"^{name}: obs has no column 'nobody'; it has "):
        call(importlib.import_module(name), atlas / "shuffled.zarr", "nobody")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("train_classifier", "--plot"),
        ("train_vae", "--plot"),
        ("train_vae", "--state"),
        ("pretrain_tokens", "--state"),
        ("inspect_atlas", "--plot"),
    ],
)
def test_a_folder_that_is_not_there_is_named_before_the_work(name, option, tmp_path, call, capsys):
    column = COLUMN.get(name, [])
    with pytest.raises(SystemExit):
        call(importlib.import_module(name), tmp_path / "absent.zarr", *column, option, tmp_path / "none" / "x")
    assert f"{tmp_path / 'none' / 'x'} cannot be written: there is no folder {tmp_path / 'none'}; make it" in (
        capsys.readouterr().err
    )
