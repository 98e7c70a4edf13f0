import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def forget(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr("dfd.data.registered._checked", {})
    monkeypatch.setattr("dfd.data.images._told", set())
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
