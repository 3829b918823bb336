"""A lock is held by one."""

import pytest

from llava_jax.console import InputError
from llava_jax.locks import LockedFile


def test_a_lock_that_its_holder_removes_is_no_lock(tmp_path):
    first = LockedFile(tmp_path / "lock")
    first.path.unlink()
    second = LockedFile(tmp_path / "lock")
    with pytest.raises(InputError, match="in use"):
        LockedFile(tmp_path / "lock")
    first.close()
    second.close()
    LockedFile(tmp_path / "lock").close()
