"""The quickest exact way to compute on the CPU is measured once and kept. A resumed run computes as before."""

from __future__ import annotations

import json
import pwd

import pytest
import torch

import survival
from indraquantum.errors import UserError
from indraquantum.files import cache_folder
from indraquantum.kernels import cpu, measured, onednn, ways
from indraquantum.kernels.ways import USUAL, Way, in_force, parsed, put_in_force, using
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint, step_checkpoint_path


@pytest.fixture
def free(monkeypatch, tmp_path):
    """Nothing is asked for, nothing is in force, nothing is kept."""
    monkeypatch.delenv(ways.VARIABLE)
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ways, "_in_force", None)
    return tmp_path / "cache" / "ways.json"


@pytest.mark.parametrize("way", [Way("torch", 7, 11), USUAL])
def test_a_way_is_what_its_text_says(way):
    assert parsed("x", str(way)) == way
    assert parsed("x", way.products) == Way(way.products, 512, 1000)


@pytest.mark.parametrize("text", ["mkl", "onednn:", "torch:0x5", "torch:5", "onednn:5x-1", "torch:5x5x5"])
def test_what_is_no_way_is_refused(monkeypatch, text):
    monkeypatch.setenv(ways.VARIABLE, text)
    with pytest.raises(
        UserError, match=r"^INDRA_PRODUCTS: got .*; must be auto, onednn or torch, with or without rows and"
    ):
        measured.quickest_way()


@pytest.mark.parametrize(
    ("exact", "seconds", "expected"),
    [
        (True, {"onednn": 9.0, "torch": 8.0}, "torch:512x1000"),  # an Intel processor without AMX
        (True, {"onednn": 5.0, "torch": 10.0}, "onednn:512x1000"),
        (True, {"onednn": 8.1, "torch": 8.0}, "onednn:512x1000"),  # not clearly quicker
        (False, {"onednn": 1.0, "torch": 8.0}, "torch:512x1000"),  # it would round
        (True, {"onednn": 8.0, "torch": 9.0, 2000: -1.0}, "onednn:512x2000"),
        (False, {"torch": 9.0, 2000: -2.0, 4000: -1.0}, "torch:512x2000"),
    ],
)
def test_the_quickest_exact_way_is_taken(monkeypatch, exact, seconds, expected):
    monkeypatch.setattr(onednn, "is_exact", lambda: exact)
    slow = {2000: 9.0}  # the first of two measurements, as where another program runs

    def seconds_of(way):
        return seconds[way.products] + seconds.get(way.tile, 0.0) + slow.pop(way.tile, 0.0)

    assert str(measured.measure(seconds_of)) == expected


def test_a_real_measurement_ends_with_an_exact_way(free):
    way = measured.quickest_way()
    assert way.products == "torch" or onednn.is_exact()
    assert json.loads(free.read_text()) == {measured._machine(): str(way)}


def test_it_is_measured_once_for_each_processor_and_kept(free, monkeypatch):
    answers = iter(["torch:512x500", "torch:512x2000", "onednn:512x4000", "onednn:512x500"])
    expected = iter(["onednn:512x4000", "onednn:512x500"])
    monkeypatch.setattr(measured, "measure", lambda: parsed("x", next(answers)))
    assert [str(measured.quickest_way()) for _ in range(3)] == ["torch:512x500"] * 3
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(measured, "_machine", lambda: "another processor")
        assert [str(measured.quickest_way()) for _ in range(2)] == ["torch:512x2000"] * 2
    assert str(measured.quickest_way()) == "torch:512x500"
    for damaged in (free.read_text()[:-9], "[" * 100_000):  # measured anew
        free.write_text(damaged)
        assert str(measured.quickest_way()) == next(expected)
    assert [path.name for path in free.parent.iterdir()] == ["ways.json"]


def test_where_nothing_can_be_written_it_is_measured_each_time(free, monkeypatch):
    free.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    monkeypatch.setattr(measured, "measure", lambda: Way("torch", 512, 500))
    assert str(measured.quickest_way()) == "torch:512x500"


def test_a_user_without_a_home_measures_each_time_and_can_name_another_cache(free, monkeypatch):
    monkeypatch.delenv("INDRAQUANTUM_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])  # as for the user of a container
    monkeypatch.setattr(measured, "measure", lambda: Way("torch", 512, 500))
    assert str(measured.quickest_way()) == "torch:512x500"
    with pytest.raises(
        UserError, match=r"^INDRAQUANTUM_CACHE: got nothing; must name a folder, because there is no home"
    ):
        cache_folder()


def test_the_way_in_force_decides_products_chunks_and_tiles(monkeypatch):
    monkeypatch.setattr(onednn, "is_exact", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    for products, inside in (("onednn", "bf16"), ("torch", before)):
        with using(Way(products, 48, 300)), onednn.onednn_products(torch.device("cpu")):
            assert settings.fp32_precision == inside
            plan = cpu.cpu_plan(32_000, torch.float32)
            assert (plan.rows, plan.tile) == (48, 300)
    with using(Way("torch", 100_000, 300)):  # the buffer stays within 32 MiB
        assert cpu.cpu_plan(32_000, torch.float32).rows == 256


def test_a_run_goes_on_as_it_began_whatever_is_quickest_by_then(world, free, tmp_path, monkeypatch, capsys):
    """Also where the file that kept the choice is gone; a checkpoint of before has the usual way."""
    monkeypatch.setattr(measured, "measure", lambda: Way("torch", 32, 100))
    settings = survival.small_run(world, tmp_path, max_steps=3, save_every=1, keep_last=9)
    seen = []
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda run: (seen.append(str(in_force())), take_step(run))[1])

    def train_from(step):
        seen.clear()
        loop.train(survival.small_run(world, tmp_path, max_steps=3, save_every=1, keep_last=9,
                                      resume=str(step_checkpoint_path(settings.output, step))))  # fmt: skip
        return seen

    loop.train(settings)
    assert seen == ["torch:32x100"] * 3
    assert ways._in_force is None  # what comes after in this process is free again
    whole = load_checkpoint("", survival.last_checkpoint(settings))
    free.unlink()
    monkeypatch.setattr(measured, "measure", lambda: Way("onednn", 16, 50))
    assert train_from(1) == ["torch:32x100"] * 2
    again = load_checkpoint("", survival.last_checkpoint(settings))
    assert all(torch.equal(weight, again.model[name]) for name, weight in whole.model.items())

    monkeypatch.setenv(ways.VARIABLE, "torch:8x40")
    assert train_from(2) == ["torch:8x40"]
    said = "From now on, products are computed with torch:8x40 instead of torch:32x100; the last bits may differ."
    assert said in capsys.readouterr().err
    monkeypatch.delenv(ways.VARIABLE)

    path = step_checkpoint_path(settings.output, 2)
    old = load_checkpoint("", path)
    del old.settings["products"]
    save_checkpoint(path, old)
    assert train_from(2) == [str(USUAL)]


def test_elsewhere_the_usual_way_is_in_force(free):
    assert in_force() == USUAL
    with using(Way("torch")):
        put_in_force(Way("torch", 1, 1))
        assert in_force() == Way("torch", 1, 1)
    assert in_force() == USUAL
