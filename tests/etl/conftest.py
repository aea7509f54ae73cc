from tests.etl.packed import paths  # noqa: F401 - a fixture
