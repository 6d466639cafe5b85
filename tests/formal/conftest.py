"""Fixtures of the proofs."""

import pytest


@pytest.fixture(autouse=True)
def failed_proofs_go_to_tmp_path(tmp_path, monkeypatch):
    """``prove`` keeps the folder of a proof that fails; here some are meant to."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
