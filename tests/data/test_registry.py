from __future__ import annotations

import subprocess
import sys

import pytest

from m2mkd_fast.data import create_dataset, list_datasets
from m2mkd_fast.errors import M2MKDError, UnknownNameError


def test_unknown_names_are_answered_with_near_ones(tmp_path):
    assert "glyphs" in list_datasets()
    with pytest.raises(UnknownNameError, match=r"unknown dataset 'digit'; did you mean 'digits'"):
        create_dataset("digit")
    with pytest.raises(UnknownNameError, match=rf"write 'folder:{tmp_path}'"):
        create_dataset(str(tmp_path))
    with pytest.raises(M2MKDError, match=r"'folder' lacks a folder, as in"):
        create_dataset("folder")
    with pytest.raises(M2MKDError, match=r"'torchvision:' lacks a name"):
        create_dataset("torchvision:")
    with pytest.raises(M2MKDError, match=r"'digits' takes nothing after a colon"):
        create_dataset("digits:8")
    with pytest.raises(UnknownNameError, match=r"'max_unreadble'; did you mean 'max_unreadable'"):
        create_dataset(f"folder:{tmp_path}", max_unreadble=3)


def test_importing_data_brings_in_no_heavy_library():
    heavy = "{'torchvision', 'timm', 'sklearn', 'matplotlib', 'triton', 'PIL'}"
    code = f"import sys, m2mkd_fast.data, m2mkd_fast.evaluate; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
