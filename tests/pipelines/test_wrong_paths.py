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
def test_what_cannot_be_written_is_named_before_the_work(name, option, tmp_path, call):
    script, column = importlib.import_module(name), COLUMN.get(name, [])
    for path, why in (
        (tmp_path / "none" / "x.png", f"there is no folder {tmp_path / 'none'}; make it"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(SystemExit, match=f"^{name}: {path} cannot be written: {why}"):
            call(script, tmp_path / "absent.zarr", *column, option, path)


@pytest.mark.parametrize("name", ["train_classifier", "train_vae", "inspect_atlas"])
def test_a_picture_of_no_format_is_refused_before_the_work(name, tmp_path, call):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for path in (tmp_path / "picture", tmp_path / "picture.docx"):
        with pytest.raises(SystemExit, match=f"^{name}: {path} cannot be drawn: '{path.suffix}' is no format .* .png"):
            call(importlib.import_module(name), tmp_path / "absent.zarr", *COLUMN.get(name, []), "--plot", path)


@pytest.mark.parametrize(
    ("name", "option"), [("train_vae", "--genes"), ("train_vae", "--epochs"), ("pretrain_tokens", "--epochs")]
)
def test_numbers_below_1_are_refused(name, option, tmp_path, call, capsys):
    with pytest.raises(SystemExit):
        call(importlib.import_module(name), tmp_path / "absent.zarr", *COLUMN[name], option, 0)
    assert f"{option} is 0; it must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_vae", "pretrain_tokens"])
def test_a_file_that_holds_no_state_is_a_line(name, atlas, tmp_path, call):
    state, other = tmp_path / "text.pt", tmp_path / "other.pt"
    state.write_text("no state")
    torch.save({"weights": torch.zeros(2)}, other)
    for path in (state, other):
        with pytest.raises(SystemExit, match=f"^{name}: {path} is no state that this script saved; give another"):
            call(importlib.import_module(name), atlas / "shuffled.zarr", *COLUMN[name], "--state", path)
