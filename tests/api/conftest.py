import pytest


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Nothing is written to the current folder, whatever a test does."""
    folder = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())
