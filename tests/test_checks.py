"""Debug mode: when it is on, what it says, and that it leaves compiled graphs alone."""

from __future__ import annotations

import threading

import pytest
import torch

import m2mkd_fast
from m2mkd_fast import checks
from m2mkd_fast.checks import debug, is_debugging, require_finite
from m2mkd_fast.errors import M2MKDError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    monkeypatch.delenv("M2MKD_DEBUG", raising=False)
    monkeypatch.setattr(checks, "_debugging", None)


def broken() -> torch.Tensor:
    values = torch.zeros(2, 3, 4)
    values[0, 2, 1], values[1, 0, 0], values[1, 2, 3] = float("inf"), float("nan"), float("-inf")
    return values


def test_it_holds_inside_the_block_and_nests():
    assert not is_debugging()
    with debug():
        assert is_debugging()
        with debug(False):
            assert not is_debugging()
        assert is_debugging()
    assert not is_debugging()


def test_an_error_inside_the_block_undoes_it():
    with pytest.raises(KeyError), debug():
        raise KeyError
    assert not is_debugging()


def test_it_decorates_functions():
    assert debug()(is_debugging)()
    assert not is_debugging()


def test_other_threads_see_it():
    seen = []
    with debug():
        thread = threading.Thread(target=lambda: seen.append(is_debugging()))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.mark.parametrize(("setting", "on"), [("1", True), ("TRUE", True), (" on ", True), ("0", False), ("", False)])
def test_the_environment_switches_it_on(monkeypatch, setting, on):
    monkeypatch.setenv("M2MKD_DEBUG", setting)
    assert is_debugging() is on
    with debug(not on):
        assert is_debugging() is not on


def test_a_misspelt_environment_is_named(monkeypatch):
    monkeypatch.setenv("M2MKD_DEBUG", "ja")
    with pytest.raises(M2MKDError, match="M2MKD_DEBUG is 'ja'; set it to 1"):
        is_debugging()


def test_the_error_names_number_place_and_remedy():
    with debug(), pytest.raises(M2MKDError) as error:
        require_finite(broken(), "routing scores", "Lower the learning rate.")
    assert str(error.value) == (
        "3 of 24 routing scores of shape [2, 3, 4] are not finite (1 NaN, 2 infinite); the first is inf at index "
        "[0, 2, 1]. Lower the learning rate."
    )


def test_a_single_number_has_a_place_too():
    with debug(), pytest.raises(M2MKDError, match=r"1 of 1 losses .*the first is nan at index \[\]"):
        require_finite(torch.tensor(float("nan")), "losses", "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_finite_values_pass(dtype):
    with debug():
        require_finite(torch.ones(3, dtype=dtype), "values", "")
        require_finite(torch.ones(0, dtype=dtype), "values", "")
        require_finite(torch.empty(3, dtype=dtype, device="meta"), "values", "")


def test_nothing_is_checked_outside():
    require_finite(broken(), "values", "")


def test_compiled_graphs_are_left_alone():
    def doubled(values):
        require_finite(values, "values", "")
        return values * 2

    with debug():
        compiled = torch.compile(doubled, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(broken()), broken() * 2, equal_nan=True)
        with pytest.raises(M2MKDError):
            doubled(broken())


def test_it_is_public():
    assert m2mkd_fast.debug is debug
