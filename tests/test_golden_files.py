"""The golden folder itself: nothing in it that no test reads, and a comparison that can fail."""

from __future__ import annotations

import fnmatch

import pytest
import torch

KNOWN = (
    "nac_*.safetensors",
    "m2mkd_nac_*.safetensors",
    "m2mkd_vmoe_*.safetensors",
    "vmoe_layer*.safetensors",
    "reference_state_manifest.json",
    "README.md",
)


def test_golden_folder_holds_no_unknown_file(golden_dir) -> None:
    unknown = [p.name for p in golden_dir.iterdir() if not any(fnmatch.fnmatch(p.name, known) for known in KNOWN)]
    assert not unknown, f"no test reads {unknown}"


def test_comparison_notices_one_wrong_number(assert_golden) -> None:
    expected = torch.randn(4, 5, dtype=torch.float64)
    assert_golden(expected.clone(), expected, "equal")
    wrong = expected.clone()
    wrong[2, 3] += 2e-9 * expected.abs().max()
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(wrong, expected, "wrong")


@pytest.mark.parametrize(
    "actual",
    [
        None,
        torch.zeros(3, dtype=torch.float64),
        torch.full((2,), float("nan"), dtype=torch.float64),
        torch.tensor([1.0, -float("inf")], dtype=torch.float64),
        torch.tensor([1e-8, 0.0], dtype=torch.float64),
    ],
    ids=["missing", "shape", "nan", "infinite", "not zero"],
)
def test_comparison_notices_other_faults(assert_golden, actual: torch.Tensor | None) -> None:
    with pytest.raises(AssertionError):
        assert_golden(actual, torch.zeros(2, dtype=torch.float64), "faulty")


def test_comparison_takes_equal_infinities(assert_golden) -> None:
    expected = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    assert_golden(expected.clone(), expected, "log of zero")
    with pytest.raises(AssertionError):
        assert_golden(torch.tensor([1.0, float("inf")], dtype=torch.float64), expected, "other sign")
