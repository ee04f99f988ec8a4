"""An exported page in a real Chromium: it writes what the package writes, and asks nobody else.

    INDRA_BROWSER_RUNTIME=FOLDER pytest -m slow tests/test_inference_page_browser.py

FOLDER holds the npm packages. Without it, npm downloads them. The tests skip where neither is there, or no browser.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from browser import chromium, expect, page_of  # noqa: F401 - a fixture
from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.inference.browser_runtime import packed_runtime, unpack_runtime
from indraquantum.inference.export_page import browser_tokenizer
from indraquantum.inference.load import Loaded, load
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.loop import train
from page_world import served

pytestmark = pytest.mark.slow
NEW = 24
PROMPTS = [
    "the cat sees a dog", "Grüße, 猫 🐈", "a </s> b <s>",
    "<img src=x onerror=alert(1)><script>alert(2)</script>\n<b>bold</b>", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def runtime():
    """The real npm packages."""
    given = os.environ.get("INDRA_BROWSER_RUNTIME")
    try:
        return packed_runtime(Path(given) if given else None)
    except UserError as error:
        pytest.skip(f"no runtime for browsers: {error}")


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    settings = TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, d_model=12, layers=1, heads=2,
        mlp_width=22, batch_tokens=480, max_steps=30,
    )  # fmt: skip
    whole = load_checkpoint("CHECKPOINT", train(settings).checkpoint)
    sure = whole.model | {"head.scale_1": whole.model["head.scale_1"] * 4}  # choices far from rounding
    save_checkpoint(folder / "run" / "sure.pt", replace(whole, model=sure))
    return folder / "run" / "sure.pt"


@pytest.fixture(scope="module")
def folder(checkpoint, runtime, tmp_path_factory):
    page = tmp_path_factory.mktemp("exported") / "page"
    options = ["--as", "page", "--outtype", "f32", "--runtime", str(runtime[0].parent)]
    with pytest.raises(SystemExit) as left:
        cli.main(["export", str(checkpoint), str(page), *options])
    assert left.value.code == 0
    return page


def write(page, prompt: str, count: int = NEW) -> None:
    """Let the page continue `prompt` greedily, and wait for the end."""
    page.fill("#prompt", prompt)
    page.fill("#count", str(count))
    page.fill("#temperature", "0")
    page.click("#write")
    page.locator("#status", has_text="tokens in").wait_for()


def test_greedy_text_and_readouts_are_those_of_python(chromium, folder, checkpoint):  # noqa: F811
    ours = load(checkpoint, torch.device("cpu"))
    with served(folder) as url, page_of(chromium, url) as page:
        page.locator("#write:enabled").wait_for()
        for prompt in PROMPTS:
            write(page, prompt)
            expected = ours.generate(prompt, max_new_tokens=NEW, temperature=0.0)
            expect(page.locator(".token")).to_have_count(len(expected.tokens))
            buttons = page.locator(".token").all()
            expect(page.locator("#text .prompt")).to_have_text(prompt)
            assert page.locator("#text img, #text script, #text b").count() == 0
            for button, token in zip(buttons, expected.tokens, strict=True):
                if token.text.strip():
                    assert button.text_content() == token.text.replace("\n", "↵").replace("\t", "⇥")
            buttons[3].focus()
            expect(page.locator("#details tbody tr")).to_have_count(8)
            names, values = (page.locator(f"#details {tag}").all_text_contents() for tag in ("dt", "dd"))
            details = dict(zip(names, values, strict=True))
            third = expected.tokens[3]
            assert float(details["probability"].removesuffix(" %")) == pytest.approx(100 * third.probability, abs=0.06)
            assert float(details["magnitude (confidence)"]) == pytest.approx(third.confidence, abs=0.001)
            assert float(details["uncertainty"].removesuffix(" nats")) == pytest.approx(
                third.uncertainty_nats, abs=0.01
            )


def test_keys_a_stop_a_full_context_and_a_phone(chromium, folder):  # noqa: F811
    with served(folder) as url, page_of(chromium, url, width=360, scheme="dark") as page:
        page.locator("#write:enabled").wait_for()
        write(page, "the cat", 9)
        page.locator(".token").first.focus()
        for key, at in (
            ("ArrowRight", 1),
            ("ArrowRight", 2),
            ("ArrowLeft", 1),
            ("End", 8),
            ("ArrowRight", 8),
            ("Home", 0),
        ):
            page.keyboard.press(key)
            expect(page.locator(".token").nth(at)).to_have_attribute("aria-pressed", "true")
        expect(page.locator('.token[tabindex="0"]')).to_have_count(1)  # one stop for the Tab key
        label = page.locator(".token").first.get_attribute("aria-label")
        assert all(word in label for word in ("probability", "magnitude", "phase"))
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360
        page.fill("#count", "2000")
        page.fill("#temperature", "1")
        page.click("#write")
        page.locator(".token").nth(5).wait_for()
        page.click("#stop")
        page.locator("#status", has_text="You stopped it.").wait_for()
        assert 5 < page.locator(".token").count() < 2000
        page.fill("#prompt", "cat " * 3000)
        page.fill("#count", "5")
        page.click("#write")
        page.locator("#status.problem", has_text="This model takes at most 2047.").wait_for()
        page.locator("#write:enabled").wait_for()


def test_a_model_that_is_cut_short_is_told(chromium, folder, tmp_path):  # noqa: F811
    shutil.copytree(folder, tmp_path / "cut")
    graph = tmp_path / "cut" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with served(tmp_path / "cut") as url, page_of(chromium, url) as page:
        page.locator("#status.problem", has_text="model.onnx ends after").wait_for()
        assert page.locator("#write:disabled").count() == 1


NODE = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "./tokenizers.mjs";
const [description, texts] = ["tokenizer.json", "texts.json"].map((name) => JSON.parse(readFileSync(name)));
const tokenizer = new Tokenizer(description, { clean_up_tokenization_spaces: false });
const ids = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids);
console.log(JSON.stringify({ ids, texts: ids.map((row) => tokenizer.decode(row, { skip_special_tokens: false })) }));
"""


@pytest.mark.parametrize("name", ["world", "shared"])
def test_the_browsers_tokenizer_gives_our_ids(name, request, runtime, world, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("no Node.js, which runs the browser's tokenizer here")
    folder = world.tokenizer if name == "world" else request.getfixturevalue("shared") / "tokenizer"
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    draw = random.Random(5)
    alphabet = [*"abc AB.,'\n\t  01234567890éß猫🐈", "\u0301", "\ufb01", "\u00a0", "\u2019", "👩\u200d👧"]
    alphabet += ["</s>", "<s>", "<unk>", "<0x0A>", "\u2581"]
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 40))) for _ in range(500)]
    texts += [*filter(None, PROMPTS), "  two  spaces ", "don't I'll WE'VE", "x" * 500, "def f(x):\n    return x\n"]
    unpack_runtime(runtime, tmp_path)
    (tmp_path / "tokenizers.js").rename(tmp_path / "tokenizers.mjs")
    loaded = Loaded(None, tokenizer, {}, None, Path())
    (tmp_path / "tokenizer.json").write_text(json.dumps(browser_tokenizer(loaded)), encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (tmp_path / "run.mjs").write_text(NODE, encoding="utf-8")
    ran = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(ran.stdout)
    for text, ids, again in zip(texts, found["ids"], found["texts"], strict=True):
        assert ids == tokenizer.encode_text(text), ascii(text)
        assert again == tokenizer.decode(ids), ascii(text)
