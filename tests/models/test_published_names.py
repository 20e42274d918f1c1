from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.published.names import check_names, grouped, with_stacked_experts, without_wrappers


def test_names_that_differ_in_numbers_are_one_line() -> None:
    names = [f"blocks.{i}.{name}" for i in range(12) for name in ("norm1.bias", "norm2.bias", "attn.qkv.weight")]
    assert grouped(names) == ["blocks.{0..11}.norm{1..2}.bias", "blocks.{0..11}.attn.qkv.weight"]
    assert grouped(["a.1", "a.3", "a.4", "b"]) == ["a.{1,3,4}", "b"]
    assert grouped(["a.0.1", "a.0.2", "a.1.1"]) == ["a.0.{1..2}", "a.1.1"]
    assert grouped([]) == []


def expanded(text: str) -> list[str]:
    match = re.search(r"\{([0-9.,]+)\}", text)
    if match is None:
        return [text]
    if ".." in match[1]:
        first, last = match[1].split("..")
        values = range(int(first), int(last) + 1)
    else:
        values = [int(value) for value in match[1].split(",")]
    return [name for value in values for name in expanded(text[: match.start()] + str(value) + text[match.end() :])]


@given(st.sets(st.builds("{}.{}.x{}".format, st.integers(0, 3), st.integers(0, 12), st.integers(0, 2)), max_size=25))
def test_fuzz_every_name_is_listed_once(names) -> None:
    listed = [name for text in grouped(sorted(names)) for name in expanded(text)]
    assert sorted(listed) == sorted(names)


def test_names_with_braces_are_left_as_they_are() -> None:
    assert grouped(["a{x}.1", "a{x}.2", "{}"]) == ["a{x}.{1..2}", "{}"]


def test_wrappers_prefixes_go_only_where_all_names_have_them() -> None:
    tensor = torch.ones(1)
    assert without_wrappers({"module.a": tensor, "module.b.module.c": tensor}).keys() == {"a", "b.module.c"}
    assert without_wrappers({"_orig_mod.module.a": tensor}).keys() == {"a"}
    assert without_wrappers({"module.a": tensor, "b": tensor}).keys() == {"module.a", "b"}
    assert without_wrappers({}) == {}


def test_single_experts_are_stacked_in_their_order() -> None:
    state = {f"m.experts.{i}.htoh4.weight": torch.full((1, 2, 3), float(i)) for i in reversed(range(11))}
    stacked = with_stacked_experts({**state, "other": torch.ones(1)}, "file")
    assert stacked.keys() == {"other", "m.experts.htoh4.weight"}
    assert stacked["m.experts.htoh4.weight"][:, 0, 0].tolist() == list(range(11))
    with pytest.raises(M2MKDError, match=r"file: the single experts of m\.experts\.htoh4\.weight"):
        with_stacked_experts({**state, "m.experts.3.htoh4.weight": torch.ones(1, 2, 4)}, "file")
    with pytest.raises(M2MKDError, match=r"0 to E-1"):
        with_stacked_experts({"m.experts.1.htoh4.weight": torch.ones(1, 2, 4)}, "file")


def test_nothing_is_raised_where_all_fits_and_all_is_named_where_not() -> None:
    state = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(3)}
    check_names(state, {"a.weight": (2, 3), "a.bias": [3]}, "file", "a model")
    with pytest.raises(M2MKDError) as error:
        check_names(state, {"a.weight": (3, 2), "a.biases": (3,)}, "file", "a model")
    text = str(error.value)
    assert text.startswith("file does not fit a model. 1 foreign names: a.bias (nearest of ours: a.biases). ")
    assert "1 names are missing: a.biases. 1 tensors have another shape: a.weight is [2, 3], [3, 2] expected" in text


def test_thousands_of_foreign_names_are_all_told() -> None:
    state = {f"layer{i}.head{j}.scale": torch.ones(1) for i in range(60) for j in range(40)}
    with pytest.raises(M2MKDError, match=r"2400 foreign names: layer\{0\.\.59\}\.head\{0\.\.39\}\.scale \(n"):
        check_names(state, {"blocks.0.norm1.weight": (1,)}, "file", "a model")
