"""Loading a saved model."""

import pytest

from scratch_gpt.errors import UserError
from scratch_gpt.model.loading import load_model


@pytest.mark.parametrize("present", [False, True])
def test_a_folder_without_a_model_is_refused(present, tmp_path):
    folder = tmp_path / "nothing"
    if present:
        folder.mkdir()
    with pytest.raises(UserError, match="holds no complete model" if present else "there is no model"):
        load_model(str(folder))
