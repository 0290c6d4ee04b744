"""Pages of weights files that are given back hold what they held, and none that was written to is."""

import torch
from safetensors.torch import load_file, save_file

from zoo.benches.peak import memory
from zoo.storage.pages import CleanPages, _clean
from zoo.storage.safetensors_file import listing, mapped


def test_pages_are_given_back_and_read_again(tmp_path):
    whole = {"a": torch.randn(1 << 21), "b": torch.randn(1 << 21), "c": torch.ones(3)}
    save_file(whole, tmp_path / "model.safetensors")
    del whole["c"]
    ours = {name: mapped(stored) for name, stored in listing([tmp_path / "model.safetensors"]).items() if name in whole}
    for held in (ours, load_file(tmp_path / "model.safetensors")):  # a map each, and one of the whole file
        sums = {name: float(held[name].sum()) for name in whole}
        before = memory("RssFile")
        pages = CleanPages()
        for name in whole:
            pages.give_back(held[name])
        assert before - memory("RssFile") > 15 << 20
        assert sums == {name: float(held[name].sum()) for name in whole}


def test_what_was_written_stays(tmp_path):
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    (stored,) = listing([tmp_path / "model.safetensors"]).values()
    held = mapped(stored)
    held[5] = 1.0
    CleanPages().give_back(held)
    assert float(held.sum()) == 1.0
    alone = torch.ones(1 << 20)
    CleanPages().give_back(alone)
    assert alone.all(), "memory of no file"


def test_the_list_of_the_system():
    rows = "{} {}\nSize: 4 kB\nAnonymous: {} kB\nSwap: 0 kB\n"
    listed = rows.format("1000-2000", "r--p 0 fe:00 1    /m/a.safetensors", 0)
    listed += rows.format("2000-3000", "rw-p 0 fe:00 1    /m/b.safetensors", 4)
    listed += rows.format("3000-4000", "rw-p 0 00:00 0 ", 0) + rows.format(
        "5000-7000", "r--p 0 fe:00 1 /m/c.safetensors", 0
    )
    assert _clean(listed) == [(0x1000, 0x2000), (0x5000, 0x7000)]
