"""Sources with weights, articles, copies and what is held out: against sets and counts made another way."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.config import PrepareSettings
from indraquantum.data import duplicates
from indraquantum.data.dataset import open_dataset
from indraquantum.data.detokenize import detokenize
from indraquantum.data.duplicates import NEAR, WORD, exact_duplicates, near_duplicates
from indraquantum.data.held_out import (
    TEST,
    TRAIN,
    VALIDATION,
    Common,
    Keys,
    hold_out,
    text_key,
    without_common,
)
from indraquantum.data.mixture import draw_sources, source_options
from indraquantum.data.prepare import prepare
from indraquantum.errors import UserError
from tiny_tokenizer import save_tiny_tokenizer

LONG = "so long that whoever has it as well has it from there"
WORDS = [f"w{number}" for number in range(500)]


def texts_of(source):
    return list(source.read_texts())


def held_out_of(sources, paragraphs):
    """The part of each text, by its key and those of its paragraphs."""
    all_keys = []
    for texts, parts in zip(sources, paragraphs, strict=True):
        found = [(text_key(part.encode()), owner) for owner, text in enumerate(parts) for part in text]
        table = np.array(found, np.uint64).reshape(-1, 2)
        documents = np.array([text_key(text.encode()) for text in texts], np.uint64)
        all_keys.append(Keys(documents, table[:, 0], table[:, 1].astype(np.int64)))
    return hold_out(all_keys)


def settings(folder, lines, items=(), **changes):
    (folder / "wiki.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "alpaca.json").write_text(json.dumps(list(items)))
    given = {"wikitext": str(folder / "wiki.txt"), "alpaca": str(folder / "alpaca.json"), "alpaca_samples": len(items)}
    given |= {"tokenizer": str(folder / "tokenizer"), "output": folder / "out" / "m.pkl", "max_length": 32}
    return PrepareSettings(**(given | changes))


def refused(chosen, *words):
    with pytest.raises(UserError) as caught:
        draw_sources(chosen)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a fifty @-@ two year old , 1 @,@ 000 of 2 @.@ 5 km .", "a fifty-two year old, 1,000 of 2.5 km."),
        ('He said " I don \'t ( know ) " ; Ross \'s car !', 'He said "I don\'t (know)"; Ross\'s car!'),
        ("= = Early life = =", "Early life"),
        (" = = Early life = = ", "Early life"),
        ("= One =\r", "One"),
        (" = 3 ", " = 3 "),
        ("the <unk> of $ 5", "the <unk> of $5"),
        ("= 3", "= 3"),
    ],
)  # fmt: skip
def test_detokenize_by_hand(before, after):
    assert detokenize(before) == after


def test_articles_keep_their_headings_and_paragraphs(tmp_path):
    lines = ["before any title", " = One = ", " a b ", " = = Part = = ", "c @-@ d", " = Empty = ", " = Two = ", "e"]
    expected = ["before any title", "= One =\na b\n= = Part = =\nc @-@ d", "= Two =\ne"]
    chosen = settings(tmp_path, lines, documents="articles")
    (source,) = draw_sources(chosen).sources
    assert texts_of(source) == expected
    (source,) = draw_sources(chosen.model_copy(update={"detokenize": True})).sources
    assert texts_of(source)[1] == "One\na b\nPart\nc-d"


def test_headings_inside_records_lose_their_signs(tmp_path):
    texts = [" = One = \n \n a @-@ b \n = = Part = = \n c", "= Two =\r\nd @-@ e"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = settings(tmp_path, [], wikitext=str(tmp_path / "a.jsonl"), detokenize=True)
    assert texts_of(draw_sources(chosen).sources[0]) == ["One\n \n a-b \nPart\n c", "Two\nd-e"]


def test_a_path_with_an_equals_sign_is_not_an_amount(tmp_path):
    for name in ("lang=en", "shards=2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(20)))
    given = {"lang=en": 20, "lang=en=7": 7, "lang=en/part.jsonl": 20, "lang=en/part.jsonl=5": 5, "lang=en/*.jsonl": 20,
             "lang=en/*.jsonl=0.5x": 10, "shards=2": 20}  # fmt: skip
    drawn = draw_sources(settings(tmp_path, ["a", "b"], text=tuple(f"{tmp_path}/{name}" for name in given))).sources
    assert [len(texts_of(source)) for source in drawn[1:]] == list(given.values())
    refused(settings(tmp_path, [], text=(f"{tmp_path}/lang=en/no.jsonl",)), "no.jsonl", "does not exist")
    refused(
        settings(tmp_path, [], text=(f"{tmp_path}/lang=en/part.jsonl=1/2",)), "part.jsonl=1/2", "must be PATH, PATH="
    )


def test_weights_and_counts(tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"more {n}" for n in range(40)))
    lines = [f"line {n}" for n in range(20)]
    chosen = settings(tmp_path, lines, wikitext_weight=2.5, text=(f"{more}=7", f"{more}=0.5x"))
    wiki, counted, half = draw_sources(chosen).sources
    assert [source.name for source in (wiki, counted, half)] == ["wikitext", "more", "more-2"]
    times = np.bincount(wiki.numbers[wiki.parts == TRAIN], minlength=20)
    assert [(wiki.parts == part).sum() for part in (VALIDATION, TEST)] == [4, 4]
    assert set(times[times > 0]) == {2, 3}, "each twice, half of them once more"
    assert np.bincount(wiki.numbers[wiki.parts != TRAIN]).max() == 1, "what is held out is not repeated"
    assert texts_of(wiki) == [lines[number] for number in wiki.numbers]
    assert (len(texts_of(counted)), len(texts_of(half))) == (7, 20)
    for url, path, samples, weight in (
        ("http://host/a.jsonl?version=20", "http://host/a.jsonl?version=20", 0, 1),
        ("http://host/a.jsonl?version=20=300", "http://host/a.jsonl?version=20", 300, None),
        ("http://host/a.jsonl?version=20=2x", "http://host/a.jsonl?version=20", 0, 2),
        ("http://host/a.jsonl=20", "http://host/a.jsonl", 20, None),
    ):
        option = source_options(chosen.model_copy(update={"text": None, "instructions": (url,)}))[-1]
        assert (option.path, option.samples, option.weight) == (path, samples, weight)
    refused(chosen.model_copy(update={"text": ("caf\udce9.txt",)}), "--text", r"caf\udce9.txt", "UTF-8")
    for name in ("wikitext", "alpaca"):
        refused(chosen.model_copy(update={name: "caf\udce9.txt"}), f"--{name}", r"caf\udce9.txt", "UTF-8")
    url = "https://host/a.jsonl?x=1#sha256=" + "1a" * 32
    options = source_options(chosen.model_copy(update={"text": None, "instructions": (url, f"{url}=3x")}))
    assert [(option.path, option.weight) for option in options[1:]] == [(url, 1), (url, 3)]
    for wrong in ("more.txt=", "more.txt=0", "more.txt=0x", "more.txt=-1", "more.txt=nanx", "more.txt=1e9x"):
        refused(chosen.model_copy(update={"text": (wrong,)}), "--text", wrong, "PATH=SAMPLES")
    refused(chosen.model_copy(update={"instructions": ("missing.json",)}), "--instructions", "does not exist")


def words_of(text):
    words = [word.strip(".,!").lower() for word in text.split()]
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def test_near_duplicates_against_all_pairs():
    draw = random.Random(3)
    texts = []
    for _ in range(60):
        words = draw.choices(WORDS, k=60)
        texts.append(" ".join(words))
        if draw.random() < 0.5:
            for _ in range(draw.randint(0, 3)):
                words[draw.randrange(60)] = "changed"
            texts.append(" ".join(words).upper() + "!")
    draw.shuffle(texts)
    shingles = [words_of(text) for text in texts]
    expected = np.zeros(len(texts), dtype=bool)
    for later in range(len(texts)):
        for earlier in range(later):
            both = len(shingles[later] & shingles[earlier])
            if not expected[earlier] and both / len(shingles[later] | shingles[earlier]) >= NEAR:
                expected[later] = True
    assert 10 < expected.sum() < 30
    assert np.array_equal(near_duplicates(texts), expected)
    assert not near_duplicates([]).size


def test_words_are_all_but_space_and_punctuation():
    """Vowel signs and emoji belong to words; and of ASCII, what `\\w` takes."""
    for one, other, is_copy in (
        ("वह काम करता है", "वह काम करती है", False), ("वह काम करता है", "वह काम, करता है।", True),
        ("😀😀", "🎉", False), ("…", "!!!", False), ("…", "…", True), ("+", "-", False),
        ("a b", "A, b!", True), ("a + b", "a - b", True), ("snake_case", "snake case", False),
        ("cafe\u0301 au lait", "cafe au lait", False),
    ):  # fmt: skip
        assert near_duplicates([one, other]).tolist() == [False, is_copy], (one, other)
    ascii_text = "".join(f"a{chr(sign)}" for sign in range(128))
    assert WORD.findall(ascii_text) == re.findall(r"\w+", ascii_text)


def test_no_copy_is_missed_among_many_texts_that_are_almost_near():
    """Texts at 0.7 of the first stand between it and its copies, and share bands with them."""
    draw = random.Random(1)
    first = draw.choices(WORDS, k=200)
    part = [" ".join([*first[:170], *draw.choices(WORDS, k=30)]) for _ in range(40)]
    near = [" ".join([*first[:190], *draw.choices(WORDS, k=10)]) for _ in range(20)]
    found = near_duplicates([*part, " ".join(first), *near, " ".join(first), *part])
    assert not found[:41].any()
    assert found[41:].all()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    lines = [f"line {number}" for number in range(20)]
    chosen = settings(tmp_path, lines)
    for changed in (lines[:-1], [*lines[:7], "another", *lines[8:]]):
        (source,) = draw_sources(chosen).sources
        (tmp_path / "wiki.txt").write_text("\n".join(changed))
        with pytest.raises(UserError, match="--wikitext: got wikitext; changed while it was read"):
            list(source.read_texts())
        (tmp_path / "wiki.txt").write_text("\n".join(lines))


def test_exact_and_near_copies_are_counted_or_removed_over_all_sources(tmp_path):
    draw = random.Random(0)
    long = [" ".join(draw.choices(WORDS, k=40)) for _ in range(10)]
    lines = [*long, long[3], long[4] + " more"]
    more = tmp_path / "more.txt"
    more.write_text("\n".join([long[0], "something else", "and again"]))
    chosen = settings(tmp_path, lines, text=(str(more),))

    def counts(how):
        sources = draw_sources(chosen.model_copy(update={"duplicates": how})).sources
        return [(s.duplicates, s.near_duplicates, len(texts_of(s))) for s in sources]

    assert counts("keep") == [(1, None, 12), (1, None, 3)]
    assert counts("count") == [(1, 2, 12), (1, 1, 3)]
    assert counts("exact") == [(1, None, 11), (1, None, 2)]
    assert counts("near") == [(1, 2, 10), (1, 1, 2)]
    assert exact_duplicates(np.array([7, 2**63, 7], np.uint64)).tolist() == [False, False, True]


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=2, max_size=60), st.integers(1, 59))
def test_no_paragraph_on_both_sides(documents, cut):
    parts = [[f"paragraph {number}" for number in document] for document in documents]
    sources = [part for part in (parts[:cut], parts[cut:]) if part]
    chosen = held_out_of([["\n".join(document) for document in source] for source in sources], sources)
    sides = [set(), set(), set()]
    for source, parts in zip(sources, chosen, strict=True):
        for document, part in zip(source, parts, strict=True):
            sides[part] |= set(document)
    assert len(set.union(*sides)) == sum(map(len, sides)), "no paragraph is in two parts"


@pytest.mark.parametrize("large_first", [True, False])
def test_a_large_source_leaves_half_of_a_small_one_for_training(large_first):
    """Each document of the small source shares its paragraph with one of the large source that would be held out."""
    large = sorted((f"large {n}" for n in range(1000)), key=lambda text: text_key(text.encode()))
    small = [f"small {n}" for n in range(9)]
    sources, paragraphs = [large, small], [[[f"shared {n}"] for n in range(len(source))] for source in (large, small)]
    if not large_first:
        sources, paragraphs = sources[::-1], paragraphs[::-1]
    chosen = held_out_of(sources, paragraphs)
    of_large, of_small = chosen if large_first else chosen[::-1]
    assert [(of_small == part).sum() for part in (TRAIN, VALIDATION, TEST)] == [5, 4, 0]
    assert [(of_large == part).sum() for part in (VALIDATION, TEST)] == [6, 10], "four families and two alone; ten"
    assert (of_large[:9] == of_small).all()


@pytest.mark.parametrize("detokenize", [False, True])
def test_held_out_articles_share_no_paragraph_with_training(tmp_path, detokenize):
    """All articles have the same heading and a line of one character. These must not link the articles."""
    draw = random.Random(1)
    lines = []
    for number in range(200):
        common = draw.choice(["", f"shared {draw.randrange(60)}, and {LONG}"])
        part = "= = The part that every article has , under the same name = ="
        lines += [f"= Title {number} =", f"own {number}", part, common, '"', f"more {number}"]
    items = [{"instruction": f"Do {n // 2}", "input": "", "output": f"out {n}"} for n in range(80)]
    chosen = settings(tmp_path, lines, items, documents="articles", detokenize=detokenize)
    save_tiny_tokenizer(tmp_path / "tokenizer")
    wiki, alpaca = draw_sources(chosen).sources
    for source in (wiki, alpaca):
        assert [(source.parts == part).sum() for part in (VALIDATION, TEST)] == [4, 4]
        sides = [set(), set(), set()]
        for text, part in zip(texts_of(source), source.parts, strict=True):
            sides[part] |= {part for part in text.split("\n") if "shared" in part or part[:3] in ("out", "Do ")}
        assert len(set.union(*sides)) == sum(map(len, sides))
    assert sum("shared" in text for text in texts_of(wiki)) > 50
    for part in (VALIDATION, TEST):
        tasks = {int(n) // 2 for n in alpaca.numbers[alpaca.parts == part]}
        assert len(tasks) == 2, "one task's two answers go together"


def test_samples_that_were_not_drawn_link_nothing(tmp_path):
    """Each article shares a line with one other, which is drawn or not; the families are made once more by hand."""
    lines = [line for n in range(60) for line in (f"= T{n} =", f"own {n}", f"line {n % 30}, {LONG}")]
    for seed in range(4):
        chosen = settings(tmp_path, lines, documents="articles", wikitext_samples=20, seed=seed)
        (source,) = draw_sources(chosen).sources
        parts = [text.split("\n")[2] for text in texts_of(source)]
        alone = {text for text, part in zip(texts_of(source), parts, strict=True) if parts.count(part) == 1}
        by_hash = sorted(texts_of(source), key=lambda text: hashlib.sha256(b"held out\0" + text.encode()).digest())
        expected = {VALIDATION: set(), TEST: set()}
        for part, chosen_texts in expected.items():
            left = 4
            for text in by_hash:
                family = {t for t in texts_of(source) if t.split("\n")[2] == text.split("\n")[2]} - alone | {text}
                if text not in set.union(*expected.values()) and len(family) <= left:
                    chosen_texts |= family
                    left -= len(family)
            found = {text for text, of_text in zip(texts_of(source), source.parts, strict=True) if of_text == part}
            assert found == chosen_texts


def test_where_everything_hangs_together_nothing_can_be_held_out(tmp_path):
    lines = [line for number in range(9) for line in (f"= T{number} =", f"own {number}", f"the same {LONG}")]
    refused(settings(tmp_path, lines, documents="articles"), "share no paragraph")


def test_provenance_leads_back_to_the_text(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    lines = [f"the cat sat on {word}" for word in ["a", "b", "c", "d", "e", "f", "dog", "mat", "red", "it"]]
    report = prepare(settings(tmp_path, lines, wikitext_samples=8, seed=5))
    dataset = open_dataset("--data", report.folder, verify=True)
    for split in (dataset.train, dataset.validation):
        offsets = split.document_offsets.tolist()
        for begin, end, number in zip(offsets, offsets[1:], split.document_numbers, strict=False):
            assert dataset.tokenizer.decode(split.tokens[begin:end]) == lines[number]
    assert sorted({*dataset.train.document_numbers, *dataset.validation.document_numbers}) != list(range(8))


def test_wrong_records_are_skipped_counted_and_listed(tmp_path, monkeypatch):
    from indraquantum.data import records

    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    save_tiny_tokenizer(tmp_path / "tokenizer")
    good = [{"id": n, "instruction": f"Do {n}", "output": "b"} for n in range(6)]
    bad = [{"instruction": None, "output": "b"}]
    bad += [{"instruction": {"text": "nested"}, "output": "b"}, {"instruction": "Empty", "output": " "}, [good[0]]]
    rows = [*good, *bad]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"instruction"\n')
    chosen = settings(tmp_path, [], alpaca=str(tmp_path / "a.jsonl"), alpaca_samples=99, skip_bad=True)
    lines = [f"line {n}".encode() for n in range(9)]
    (tmp_path / "wiki.txt").write_bytes(b"\n".join([*lines, b"caf\xe9", b"x" * 5000, "naïve".encode()]) + b"\n")
    report = prepare(chosen)
    assert [(s.name, s.available) for s in report.sources] == [("wikitext", 10), ("alpaca", 6)]
    listed = [json.loads(line) for line in (report.folder / "skipped.jsonl").read_text().splitlines()]
    assert report.skipped == len(listed) == 7
    reasons = " | ".join(f"{entry['source']}: {entry['reason']}" for entry in listed)
    for reason in ("in line 10", "line 11 must be at most", "is null", "it is an object",
                   "empty output", "it is a list", "must be JSON"):  # fmt: skip
        assert reason in reasons
    assert "skipped.jsonl" in open_dataset("--data", report.folder, verify=True).manifest["files"]
    refused(chosen.model_copy(update={"skip_bad": False}), "byte 66 is not")
    assert prepare(settings(tmp_path, [f"line {n}" for n in range(9)])).skipped == 0
    assert not (report.folder / "skipped.jsonl").exists()


@pytest.mark.parametrize("shared", [20, 60])
def test_a_line_that_many_documents_share_does_not_keep_them_together(tmp_path, shared):
    """Up to 20 documents stay together and can't be held out; more do not, and the note names the line."""
    own = [f"and {LONG}" if n > 4 else "own" for n in range(shared)]
    lines = [line for n in range(shared) for line in (f"= T{n} =", f"the same {LONG}", own[n])]
    chosen = settings(tmp_path, lines, documents="articles")
    if shared == 20:
        refused(chosen, "share no paragraph", "it gives 20 documents; those that share a paragraph stay together")
        return
    (source,) = draw_sources(chosen).sources
    assert [(source.parts == part).sum() for part in (VALIDATION, TEST)] == [4, 4]
    assert list(source.reading.notes) == [
        f"the text {f'the same {LONG}'[:60]!r} is in 60 different documents, so it may be in several splits; so may "
        "1 other text of many documents"
    ]


def test_a_line_of_many_documents_beside_paragraphs_that_keep_some_together(tmp_path):
    """Documents 2n and 2n + 1 share a line that no other has. The samples that were not drawn do not count."""
    lines = [line for n in range(90) for line in (f"= T{n} =", f"pair {n // 2}, {LONG}", f"the same {LONG}")]
    (source,) = draw_sources(settings(tmp_path, lines, documents="articles", wikitext_samples=70)).sources
    pairs = [{text.split("\n")[1] for text, part in zip(texts_of(source), source.parts, strict=True) if part == of_part}
             for of_part in (TRAIN, VALIDATION, TEST)]  # fmt: skip
    assert len(set.union(*pairs)) == sum(map(len, pairs))
    assert [(source.parts == part).sum() for part in (VALIDATION, TEST)] == [4, 4]
    assert "is in 70 different documents" in next(iter(source.reading.notes))


@pytest.mark.parametrize(
    ("documents", "owners", "counted"),
    [
        (range(100), range(3, 24), 21),
        (range(100), range(20), None),
        (range(100), [5] * 30, None),  # one document has it 30 times
        ([7] * 100, range(30), None),  # equal documents
        (range(4000), range(40), None),
        (range(4000), range(41), 41),
    ],
)
def test_what_counts_as_a_paragraph_of_many_documents(documents, owners, counted):
    hashes = [text_key(f"document {number}".encode()) for number in documents]
    owners = np.array([*owners, 0])
    paragraphs = np.array([text_key(b"licence")] * (len(owners) - 1) + [1], np.uint64)
    keys, common = without_common(Keys(np.array(hashes, np.uint64), paragraphs, owners))
    assert common == ([] if counted is None else [Common(text_key(b"licence"), owners[0], counted)])
    assert keys.paragraphs.tolist() == (paragraphs.tolist() if counted is None else [1])
    assert keys.owners.tolist() == (owners.tolist() if counted is None else [0])


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\u2028", "\u2029", "\x85"])
def test_a_paragraph_ends_at_every_line_end(tmp_path, end):
    """Documents n and n + 30 share a line, and so do the answers n and n + 30."""
    texts = [f"own {n}{end}line {n % 30}, {LONG}" for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    items = [{"instruction": f"Do {n}", "output": f"out {n}{end}answer {n % 30}, {LONG}"} for n in range(60)]
    chosen = settings(tmp_path, [], items, wikitext=str(tmp_path / "a.jsonl"))
    for source in draw_sources(chosen).sources:
        shared = [text.split(end)[-1] for text in texts_of(source)]
        parts = [{line for line, of_text in zip(shared, source.parts, strict=True) if of_text == part}
                 for part in (TRAIN, VALIDATION, TEST)]  # fmt: skip
        assert len(set.union(*parts)) == sum(map(len, parts)) == 30
        assert [len(part) for part in parts[1:]] == [2, 2]


def test_a_refusal_for_lack_of_documents_says_how_many_were_drawn_and_differ(tmp_path):
    chosen = settings(tmp_path, ["a", "b", "c"], wikitext_samples=1)
    refused(chosen, "at least 2 different documents", "; it gives 3 documents, of which 1 was drawn")
    refused(settings(tmp_path, ["a", "a"]), "; it gives 2 documents, with 1 different text")
    (tmp_path / "more.txt").write_text("b\n")
    chosen = settings(tmp_path, ["a"], text=(str(tmp_path / "more.txt"),))
    refused(chosen, "; the sources give 2 documents; no source has 2 that differ")


def test_near_copies_are_found_in_blocks_that_take_little_memory(monkeypatch):
    texts = [" ".join(random.Random(seed).choices(WORDS, k=300)) for seed in (1, 2, 1)]
    found, signatures = [], []
    for size in (7, 1 << 20):
        monkeypatch.setattr(duplicates, "BLOCK_SHINGLES", size)
        found.append(near_duplicates(texts).tolist())
        signatures.append(duplicates._signature(np.arange(1, 1000, dtype=np.uint64)).tolist())
    assert found == [[False, False, True]] * 2
    assert signatures[0] == signatures[1]
    monkeypatch.undo()
    shingles = np.arange(1 << 17, dtype=np.uint64)  # at once, they would take 64 MB for each step
    tracemalloc.start()
    duplicates._signature(shingles)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20
