"""A data directory for the whole session, and documents with known tokens."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """The data directory of all data tests; never the user's own."""
    folder = tmp_path_factory.mktemp("fastlm_data")
    before = os.environ.get("FASTLM_DATA")
    os.environ["FASTLM_DATA"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FASTLM_DATA"]
    else:
        os.environ["FASTLM_DATA"] = before
