from __future__ import annotations

import os
import pickle
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2mkd_fast.data.string_table import StringTable


@given(strings=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), data=st.data())
@settings(max_examples=50, deadline=None)
def test_it_holds_what_a_list_holds(strings, data):
    table = StringTable(strings)
    assert list(table) == strings and len(table) == len(strings)
    assert list(pickle.loads(pickle.dumps(table))) == strings
    if strings:
        indices = data.draw(st.lists(st.integers(0, len(strings) - 1)))
        assert list(table.subset(torch.tensor(indices, dtype=torch.int64))) == [strings[index] for index in indices]
        assert table[-1] == strings[-1]
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            table[outside]


def test_names_that_are_no_unicode_come_back():
    name = os.fsdecode(b"caf\xe9.jpg")
    assert os.fsencode(StringTable([name])[0]) == b"caf\xe9.jpg"


def private_pages_of_child(strings):
    """Memory in KiB that a forked process comes to own by reading every string."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for string in strings:
            len(string)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read()) * resource.getpagesize() // 1024


def test_reading_it_in_a_forked_process_copies_no_memory():
    strings = [f"train/n{index:08d}/n{index:08d}_{index}.JPEG" for index in range(50_000)]
    table = StringTable(strings)
    assert private_pages_of_child(strings) > 1000
    assert private_pages_of_child(table) < 500
