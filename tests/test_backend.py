"""The choice of backend: forced, nested, from the environment, and what is said when it cannot be had."""

from __future__ import annotations

import pytest
import torch

from m2mkd_fast import backend
from m2mkd_fast.backend import BackendFallbackWarning, device_reason, select_backend, use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError

CAN_RUN = {"triton": None, "cuda": None}


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("M2MKD_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_wishes", None)
    monkeypatch.setattr(backend, "_said", set())


def test_the_first_that_can_run_is_taken():
    assert select_backend("op", CAN_RUN) == "triton"
    assert select_backend("op", {"triton": "float64", "cuda": None}) == "cuda"


def test_forcing_holds_inside_the_block_only():
    with use_backend("cuda"):
        assert select_backend("op", CAN_RUN) == "cuda"
        with use_backend(op="reference"):
            assert select_backend("op", CAN_RUN) == "reference"
            assert select_backend("other", CAN_RUN) == "cuda"
        with use_backend("auto"):
            assert select_backend("op", CAN_RUN) == "triton"
        assert select_backend("op", CAN_RUN) == "cuda"
    assert select_backend("op", CAN_RUN) == "triton"


def test_an_error_inside_the_block_undoes_the_force():
    with pytest.raises(KeyError), use_backend("cuda"):
        raise KeyError
    assert select_backend("op", CAN_RUN) == "triton"


def test_an_operator_by_name_goes_before_the_rest():
    with use_backend("reference", op="cuda"):
        assert select_backend("op", CAN_RUN) == "cuda"
        assert select_backend("other", CAN_RUN) == "reference"


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [
        ("reference", {"op": "reference", "other": "reference"}),
        ("op=cuda", {"op": "cuda", "other": "triton"}),
        ("reference, op=cuda", {"op": "cuda", "other": "reference"}),
        ("", {"op": "triton", "other": "triton"}),
    ],
)
def test_the_environment_forces(monkeypatch, setting, chosen):
    monkeypatch.setenv("M2MKD_BACKEND", setting)
    assert {op: select_backend(op, CAN_RUN) for op in chosen} == chosen


def test_a_misspelt_environment_is_named(monkeypatch):
    monkeypatch.setenv("M2MKD_BACKEND", "op=tritn")
    with pytest.raises(UnknownNameError, match="unknown backend 'tritn'; did you mean 'triton'"):
        select_backend("op", CAN_RUN)


def test_a_forced_backend_that_cannot_run_says_why_and_what_to_do():
    with use_backend("triton"), pytest.raises(M2MKDError) as error:
        select_backend("op", {"triton": "the input is float64"})
    assert "cannot run op: the input is float64" in str(error.value)
    assert "use_backend(op='auto')" in str(error.value)


@pytest.mark.filterwarnings("ignore::m2mkd_fast.backend.BackendFallbackWarning")
def test_falling_back_is_said_once_for_each_reason():
    for reason in ("not built", "not built", "too wide"):
        select_backend("op", {"cpu": reason, "cuda": device_reason(torch.zeros(1), "cuda")})
    with pytest.warns(BackendFallbackWarning) as said:
        select_backend("other", {"cpu": "not built"})
    assert [str(warning.message) for warning in said] == ["other runs its plain PyTorch reference (cpu: not built)"]
    assert backend._said == {("op", "cpu: not built"), ("op", "cpu: too wide"), ("other", "cpu: not built")}


def test_an_input_on_another_device_is_no_cause_for_a_warning(recwarn):
    assert select_backend("op", {"cuda": device_reason(torch.zeros(1), "cuda")}) == "reference"
    assert not recwarn.list
