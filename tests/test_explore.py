"""The state explorer: its figures are those of `indra test --show-state`, of transformers and of the signals."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models

from browser import chromium, expect, page_of, served  # noqa: F401 - a fixture
from indraquantum import cli
from indraquantum.config import TestSettings, TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.evaluation.held_out import to_tensors
from indraquantum.inference.explore import held_out_row, vocabulary, written
from indraquantum.inference.load import load
from indraquantum.live.monitor import site_of
from indraquantum.teacher.signals import open_signals
from indraquantum.training import loop

TINY = {"threads": 1, "d_model": 7, "state_width": 6, "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    return loop.train(TrainSettings(data=world.data, output=folder / "run", logs=folder / "logs", max_steps=30, **TINY))


@pytest.fixture(scope="module")
def loaded(run):
    return load(run.checkpoint, torch.device("cpu"))


def test_figures_are_those_that_the_command_prints(run, loaded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        cli.main(["test", str(run.checkpoint), "--prompt", "the cat", "--max-new-tokens", "12", "--show-state"])
    printed = [
        re.findall(r"'(.*)' +│ +(\S+) +│ +(\S+) +│ +(\S+)", line) for line in capsys.readouterr().out.splitlines()
    ]
    printed = [found[0] for found in printed if found]
    tokens = written(loaded, TestSettings(prompt="the cat", max_new_tokens=12))["tokens"]
    assert len(tokens) == len(printed) > 3
    for token, (text, *figures) in zip(tokens, printed, strict=True):
        assert repr(token["text"])[1:-1] == text
        assert list(token["shown"].values()) == figures


@torch.no_grad()
def states_of(model) -> torch.Tensor:
    """The head's complex states (V, c), from the definition: M exp(iP) and the embedding times i, 7 numbers for 6."""
    e = model.embedding.weight
    magnitude, phase = model.projector.polar(e)
    turned = torch.cat([-e[:, 3:6], e[:, :3], e[:, 6:]], dim=1)
    added = torch.complex(turned[:, :6], F.pad(turned[:, 6:], (0, 5)))
    return torch.polar(magnitude.abs(), phase) * magnitude.sign() + added  # a negative one turns by pi


def test_terms_sum_to_the_logits_of_transformers(loaded):
    found = written(loaded, TestSettings(prompt="the cat", max_new_tokens=6))
    model, ids = loaded.model, [*loaded.tokenizer.encode_prompt("the cat"), *(token["id"] for token in found["tokens"])]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, -len(found["tokens"]) :]
    states = states_of(model)
    for token, row in zip(found["tokens"], logits, strict=True):
        log_probabilities = row.log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum().item()
        assert token["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert [one["id"] for one in token["alternatives"]][:1] == [row.argmax().item()]
        assert sum(one["chosen"] for one in token["alternatives"]) == 1
        for one in token["alternatives"]:
            assert one["logit"] == pytest.approx(row[one["id"]].item(), abs=1e-4)
            assert one["probability"] == pytest.approx(log_probabilities[one["id"]].exp().item(), rel=1e-3)
            total = sum(term["term"] for term in one["terms"]) + one["others"] + one["bias"]
            assert total == pytest.approx(one["logit"], abs=1e-4)
            for term in one["terms"]:
                assert term["magnitude"] == pytest.approx(states[one["id"], term["dimension"]].abs().item(), rel=1e-4)
                product = term["magnitude"] * term["amplitude"] * np.cos(term["angle"]) * model.scale.item()
                assert term["term"] == pytest.approx(product, rel=1e-4, abs=1e-5)
            sizes = [abs(term["term"]) for term in one["terms"]]
            assert sizes == sorted(sizes, reverse=True)


def test_a_held_out_row_stands_beside_the_teachers_figures(world, loaded):
    dataset = open_dataset("--data", world.data)
    signals, batch = open_signals("--signals", world.signals, dataset), dataset.validation.batch(np.array([1]))
    found = held_out_row(loaded, dataset.validation, 1, signals)["tokens"]
    there = batch.labelled[0]
    teacher = signals.batch("validation", batch.index[0, there])
    assert [token["id"] for token in found] == batch.labels[0, there].tolist()
    assert [token["teacher_entropy"] for token in found] == teacher.entropy_N.tolist()
    assert [token["teacher_confidence"] for token in found] == teacher.confidence_N.tolist()
    ids, positions, segments = to_tensors(batch, torch.device("cpu")).values()
    with torch.no_grad():
        logits = loaded.model(ids, position_ids=positions, segment_ids=segments).logits[0, torch.from_numpy(there)]
    labels = torch.from_numpy(batch.labels[0, there])
    expected = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert [token["probability"] for token in found] == pytest.approx(expected.tolist(), rel=1e-4)
    without = held_out_row(loaded, dataset.validation, 1, None)["tokens"]
    assert {token["teacher_entropy"] for token in without} == {None}
    with pytest.raises(UserError, match="must be from 0 to"):
        held_out_row(loaded, dataset.validation, dataset.validation.num_rows, signals)


def test_the_tokens_of_a_row_make_up_its_text_with_blanks(world, loaded):
    """Decoders such as those of SentencePiece drop the blank before the first token of what they decode."""
    control = {loaded.tokenizer.bos_id: "<s>", loaded.tokenizer.eos_id: "</s>"}
    names = {control.get(number, f"▁w{number}"): number for number in range(loaded.tokenizer.vocabulary_size)}
    backend = Tokenizer(models.WordLevel(names, unk_token="<s>"))
    backend.decoder = decoders.Metaspace()
    spaced = TextTokenizer(backend, loaded.tokenizer.bos_id, loaded.tokenizer.eos_id)
    split = open_dataset("--data", world.data).validation
    found = held_out_row(replace(loaded, tokenizer=spaced), split, 1, None)["tokens"]
    batch, expected = split.batch(np.array([1])), ""
    for segment in range(batch.segments.max() + 1):
        there = batch.labelled[0] & (batch.segments[0] == segment)
        first = batch.input_ids[0, there][:1].tolist()
        whole = spaced.decode([*first, *batch.labels[0, there].tolist()])
        expected += whole[len(spaced.decode(first)) :]
    assert "".join(token["text"] for token in found) == expected
    assert expected.count(" ") > 3


def test_the_map_of_a_dimension_is_that_of_the_states(loaded):
    states = states_of(loaded.model)
    found = vocabulary(loaded, 4)
    assert found["magnitude"] == pytest.approx(states[:, 4].abs().tolist(), rel=1e-4)
    wrapped = torch.polar(torch.ones(len(states)), torch.tensor(found["phase"]))
    assert (wrapped - states[:, 4] / states[:, 4].abs()).abs().max() < 1e-3
    with pytest.raises(UserError, match="from 0 to 5"):
        vocabulary(loaded, 6)
    whole = vocabulary(loaded, None)
    assert whole["aligned"] == sorted(loaded.aligned)
    expected = loaded.model.amplitude(loaded.model.lift_table()).abs()
    assert whole["magnitude"] == pytest.approx(expected.tolist(), rel=1e-4)


def post(server, path, body) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def test_wrong_questions_are_told_in_one_line(run, tmp_path):
    with served(site_of(run.metrics.parent.parent)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("GET", "/api/runs")
        (one,) = json.loads(connection.getresponse().read())["runs"]
        connection.close()
        right = {"run": one["id"], "checkpoint": run.checkpoint.name, "prompt": "the cat"}
        assert post(server, "/api/write", right | {"max_new_tokens": 3})[0] == 200
        assert post(server, "/api/row", right | {"row": 0})[1]["tokens"][0]["teacher_entropy"] > 0
        for changes, status, word in (
            ({"checkpoint": "../../../etc/passwd"}, 404, "no such checkpoint"),
            ({"checkpoint": str(run.checkpoint)}, 404, "no such checkpoint"),
            ({"checkpoint": None}, 404, "no such checkpoint"), ({"run": "../x"}, 404, "no such run"),
            ({"max_new_tokens": 10_000}, 400, "at most 256"), ({"temperature": -1}, 400, "temperature"),
            ({"temperature": "hot"}, 400, "temperature"), ({"prompt": "a" * 30_000}, 400, "20,000"),
            ({"prompt": "a \ud800"}, 400, "UTF-8"), ({"prompt": None}, 400, "prompt"), ({"prompt": 5}, 400, "prompt"),
            ({"prompt": "the cat " * 2000}, 400, "must be at most"), ({"instruction": "x"}, 400, "prompt"),
        ):  # fmt: skip
            found = post(server, "/api/write", right | changes)
            assert found[0] == status, found
            assert word in found[1]["error"]
            assert "\n" not in found[1]["error"]
        for row in (-1, 10**30, "1", None, True):
            assert post(server, "/api/row", right | {"row": row})[0] == 400


def test_the_explorer_in_a_browser_with_a_hostile_prompt(chromium, run, loaded):  # noqa: F811
    prompt = "<script>document.title='x'</script><img src=x onerror=document.title='y'> the cat"
    tokens = written(loaded, TestSettings(prompt=prompt, max_new_tokens=8))["tokens"]
    logs = run.metrics.parent.parent
    site = site_of(logs)
    (run_id,) = (one["id"] for one in site.get["/api/runs"]({})["runs"])
    with served(site) as server, page_of(chromium, f"{server.url}#view=state&runs={run_id}") as page:
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("New tokens").fill("8")
        page.get_by_role("button", name="Continue the prompt").click()
        expect(page.locator(".token")).to_have_count(len(tokens))
        page.locator(".token").nth(1).click()
        page.keyboard.press("ArrowRight")
        shown = " · ".join(f"{name} {value}" for name, value in tokens[2]["shown"].items())
        page.get_by_text(shown, exact=True).wait_for()
        expect(page.locator("pre")).to_contain_text(prompt)
        page.get_by_role("button", name="Read this row").click()
        page.get_by_role("columnheader", name="teacher's entropy").wait_for()
        page.get_by_role("button", name="Show the vocabulary").click()
        page.get_by_role("searchbox", name="Search").fill("cat")
        page.get_by_role("cell", name="cat").first.wait_for()
        page.get_by_role("spinbutton", name="Dimension").fill("4")
        with page.expect_response("**/api/vocabulary?*dimension=4*"):
            page.get_by_role("spinbutton", name="Dimension").press("Enter")
        with page.expect_response(
            re.compile("/api/vocabulary.*dimension=(&|$)")
        ):  # another model may have fewer dimensions
            page.get_by_role("button", name="Show the vocabulary").click()
        expect(page.get_by_role("spinbutton", name="Dimension")).to_have_value("")
        assert page.title() == "IndraQuantum monitor"
        assert page.locator("img").count() == 0
        assert page.locator("main script").count() == 0


def test_a_vocabulary_of_any_size_is_drawn_and_a_late_answer_replaces_nothing(chromium, run):  # noqa: F811
    count, site = 200_000, site_of(run.metrics.parent.parent)
    many = json.dumps(
        {"aligned": ["phase"], "magnitude": [0.5] * count, "phase": [0.1] * count, "texts": ["a"] * count}
    )
    (run_id,) = (one["id"] for one in site.get["/api/runs"]({})["runs"])
    with served(site) as server, page_of(chromium, f"{server.url}#view=state&runs={run_id}") as page:
        page.route("**/api/vocabulary?*", lambda route: route.fulfill(body=many, content_type="application/json"))
        page.get_by_role("button", name="Show the vocabulary").click()
        page.get_by_text("200,000 tokens").wait_for()
        page.get_by_text("never aligned the magnitude readout with a teacher, so the magnitude says").wait_for()
        expect(page.get_by_text("never aligned the phase")).to_have_count(0)
        held = []
        page.route("**/api/details?*", lambda route: held.append(route))
        page.get_by_role("tab", name="Curves").click()
        with page.expect_request("**/api/details?*"):
            page.get_by_role("tab", name="State explorer").click()
        page.get_by_role("tab", name="Curves").click()
        expect(page.locator("#chart-loss canvas")).to_have_count(1)
        with page.expect_response("**/api/details?*"):
            for route in held:
                route.continue_()
        page.wait_for_timeout(300)
        expect(page.get_by_role("heading", name="Ask")).to_have_count(0)
        expect(page.locator("#chart-loss canvas")).to_have_count(1)
