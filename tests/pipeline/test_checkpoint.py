"""Checkpoints: what was written comes back to the bit, and no damage to either file goes unnoticed."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch

from m2mkd_fast import atomic
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.checkpoint import Checkpoints

TENSORS = {"weight": torch.arange(6.0).view(2, 3).T, "count": torch.tensor(7), "half": torch.ones(3).half()}
FACTS = {"loss": 0.1 + 0.2, "terms": {"task": float("nan")}, "name": "Schlüssel", "list": [1, 2.5, None, True]}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path, said) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)


def fill(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, {"step": torch.tensor(step)}, {"at": step})


def files(checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_is_saved_comes_back(checkpoints, said):
    checkpoints.save(3, TENSORS, FACTS)
    tensors, facts = checkpoints.load()
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert math.isnan(facts["terms"].pop("task"))
    assert facts == FACTS | {"terms": {}}
    assert said == []


def test_tensors_that_overlap_are_each_written_whole(checkpoints):
    whole = torch.arange(10.0)
    checkpoints.save(0, {"whole": whole, "part": whole[2:5]}, {})
    assert torch.equal(checkpoints.load()[0]["part"], torch.tensor([2.0, 3.0, 4.0]))


def test_nothing_there_is_none_and_no_word(checkpoints, said):
    assert checkpoints.load() is None
    checkpoints.clear()
    assert said == []


def test_the_last_ones_are_kept_and_the_newest_is_taken(checkpoints):
    fill(checkpoints, 2, 4, 6)
    assert files(checkpoints) == ["00000004.json", "00000004.safetensors", "00000006.json", "00000006.safetensors"]
    assert checkpoints.load()[1] == {"at": 6}


def test_steps_of_many_digits_keep_their_order(checkpoints):
    fill(checkpoints, 99_999_999, 100_000_000)
    assert checkpoints.load()[1] == {"at": 100_000_000}


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_any_flipped_bit_is_found(checkpoints, said, kind):
    fill(checkpoints, 2, 4)
    path = checkpoints.folder / f"00000004.{kind}"
    intact = path.read_bytes()
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert checkpoints.load()[1] == {"at": 2}, place
    assert len(said) == len(intact)
    assert all(path.name in line and "going on from the checkpoint of step 2" in line for line in said)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("left", [0, 1, -1, None], ids=["empty", "one byte", "all but one", "gone"])
def test_a_truncated_or_missing_file_is_found(checkpoints, said, kind, left):
    fill(checkpoints, 2, 4)
    path = checkpoints.folder / f"00000004.{kind}"
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    assert checkpoints.load()[1] == {"at": 2}
    (line,) = said
    assert path.name in line
    assert "step 2" in line


def test_a_file_of_another_step_is_found(checkpoints, said):
    fill(checkpoints, 2, 4)
    for kind in ("json", "safetensors"):
        (checkpoints.folder / f"00000004.{kind}").write_bytes((checkpoints.folder / f"00000002.{kind}").read_bytes())
    assert checkpoints.load()[1] == {"at": 2}
    assert "00000004.json is damaged" in said[0]


def test_all_damaged_starts_over_and_says_so_in_one_line(checkpoints, said):
    fill(checkpoints, 2, 4)
    for path in checkpoints.folder.glob("*.safetensors"):
        path.write_bytes(b"")
    assert checkpoints.load() is None
    (line,) = said
    assert "00000002.safetensors is damaged (0 bytes of" in line and "00000004.safetensors" in line
    assert line.endswith("training starts over from step 0")


def test_without_a_listener_damage_is_a_warning(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 2)
    (tmp_path / "00000002.json").unlink()
    with pytest.warns(UserWarning, match=r"00000002.safetensors is not complete .*starts over"):
        assert checkpoints.load() is None


def test_what_was_passed_over_does_not_push_out_what_is_intact(checkpoints):
    fill(checkpoints, 2, 4)
    (checkpoints.folder / "00000004.json").write_bytes(b"{}")
    fill(checkpoints, 3)
    assert files(checkpoints) == ["00000002.json", "00000002.safetensors", "00000003.json", "00000003.safetensors"]


def test_a_full_disk_leaves_the_earlier_ones_and_no_rest(checkpoints, monkeypatch):
    fill(checkpoints, 2, 4)
    before = files(checkpoints)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(M2MKDError, match="cannot write .*00000006.safetensors.*No space left"):
        fill(checkpoints, 6)
    assert files(checkpoints) == before
    assert checkpoints.load()[1] == {"at": 4}


def test_what_a_killed_process_left_is_cleared_and_other_files_are_not(checkpoints):
    fill(checkpoints, 2)
    (checkpoints.folder / ".00000004.safetensors.123.partial").write_bytes(b"half")
    (checkpoints.folder / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert files(checkpoints) == ["notes.txt"]
    (checkpoints.folder / "notes.txt").unlink()
    checkpoints.clear()
    assert not checkpoints.folder.exists()


def test_keeping_none_is_an_error(tmp_path):
    with pytest.raises(M2MKDError, match="keep=0 checkpoints: at least 1"):
        Checkpoints(tmp_path, keep=0)
