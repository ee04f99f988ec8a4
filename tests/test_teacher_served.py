"""A served teacher: a real server on loopback that answers as vLLM does, with and without faults."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.teacher import served
from indraquantum.teacher.capture import capture
from indraquantum.teacher.served import entropy_bounds
from indraquantum.teacher.signals import open_signals, verify_signals

SHARD = 480
K = 7


class Handler(BaseHTTPRequestHandler):
    """`server.faults` holds what goes wrong with the next requests; `server.prompts` what was answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.reply(fault, {"error": "busy"}, {"Retry-After": "0"})
        if fault == "drop":
            self.close_connection = True
            return None
        answer = self.server.answer(body)
        if callable(fault):
            fault(answer["choices"][0]["prompt_logprobs"])
        else:
            self.server.prompts.append(tuple(body["prompt"]))
        return self.reply(200, answer, cut=fault == "cut")

    def reply(self, status, value, headers=None, cut=False):
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut


@pytest.fixture(scope="module")
def model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world.teacher).eval()


@pytest.fixture
def server(model, monkeypatch):
    def answer(body):
        assert body["model"] == "tiny"
        prompt = torch.tensor(body["prompt"])
        with server.lock, torch.inference_mode():
            logprobs_TV = model(prompt[None]).logits[0].log_softmax(-1)
        entries = [None]
        for place, actual in enumerate(body["prompt"][1:]):
            ids = {*logprobs_TV[place].topk(body["prompt_logprobs"]).indices.tolist(), actual}
            entries.append({str(i): {"logprob": float(logprobs_TV[place, i]), "rank": 1} for i in ids})
        return {"choices": [{"text": "", "prompt_logprobs": entries}]}

    monkeypatch.setattr(served, "_FIRST_WAIT_SECONDS", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.faults, server.prompts, server.times = threading.Lock(), [], [], []
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(world, server, tmp_path):
    return CaptureSettings(
        data=world.data, teacher=f"http://127.0.0.1:{server.server_port}/v1", output=tmp_path / "signals",
        kind="topk", top_k=K, concurrency=3, batch_tokens=480,
    )  # fmt: skip


def changed(settings, **changes):
    return CaptureSettings(**settings.model_dump() | changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_served_signals_equal_local_ones_and_entropy_lies_between_its_bounds(settings, world, server, tmp_path):
    """Over faults of every passing kind; the same model asked here is the reference."""
    server.faults += [500, "drop", 429, None, "cut", 503]
    report = capture(settings, None, SHARD)
    local = CaptureSettings(
        data=world.data, teacher=str(world.teacher), output=tmp_path / "local", kind="topk", top_k=K, device="cpu"
    )
    exact = capture(local, None, SHARD)
    dataset = open_dataset("--data", settings.data)
    for split in ("train", "validation"):
        index = np.arange(getattr(dataset, split).num_tokens)
        ours = verify_signals("--signals", settings.output, dataset).batch(split, index)
        theirs = open_signals("--signals", local.output, dataset).batch(split, index)
        assert ours.entropy_N is None
        torch.testing.assert_close(ours.confidence_N, theirs.confidence_N, rtol=2e-3, atol=1e-4)
        same = (ours.ids_NK == theirs.ids_NK).all(1)  # near ties may be broken otherwise
        assert same.float().mean() > 0.98
        torch.testing.assert_close(ours.probs_NK[same], theirs.probs_NK[same], rtol=4e-3, atol=1e-4)
    assert report.statistics.mean_entropy_nats is None
    low, high = report.statistics.mean_entropy_bounds_nats
    assert low < exact.statistics.mean_entropy_nats < high
    for split, value in exact.statistics.teacher_cross_entropy.items():
        assert report.statistics.teacher_cross_entropy[split] == pytest.approx(value, rel=1e-4)
    page = json.loads((settings.output / "manifest.json").read_text())
    assert (page["served"], page["kind"], page["shards"][0]["precision"]) == (True, "topk", "served")


def test_a_server_that_goes_away_is_not_asked_again_for_what_it_gave(settings, server, tmp_path):
    whole = changed(settings, output=tmp_path / "whole", batch_tokens=48)
    capture(whole, None, SHARD)
    everything = sorted(server.prompts)
    server.prompts.clear()
    answer, left = server.answer, [40]

    def dying(body):
        left[0] -= 1
        if left[0] < 0:
            server.faults += [500] * 1000
        return answer(body)

    server.answer = dying
    once = changed(whole, concurrency=1, output=settings.output)
    with pytest.raises(UserError, match=r"--teacher: .*failed 8 times \(status 500.*to resume"):
        capture(once, None, SHARD)
    assert list(settings.output.glob("*.journal"))
    given, server.faults, server.answer = len(server.prompts), [], answer
    assert given > 30
    capture(once, None, SHARD)
    assert files_of(settings.output) == files_of(whole.output)
    assert len(server.prompts) <= len(everything) + 6  # only the failed row is asked again
    assert sorted(set(server.prompts)) == sorted(set(everything))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda entries: entries.pop(), "prompt_logprobs for"),
        (lambda entries: entries[1].update({"99999": {"logprob": -1.0}}), "outside the dataset's vocabulary"),
        (lambda entries: entries[1].clear(), "0 tokens where 7"),
        (lambda entries: entries[1].update({key: {"logprob": -0.1} for key in entries[1]}), "sum to"),
        (lambda entries: entries[1].update({key: {"logprob": float("nan")} for key in entries[1]}), "log-probability"),
        (lambda entries: entries[1].update({key: {} for key in entries[1]}), "KeyError"),
        (lambda entries: entries.__setitem__(1, None), "AttributeError"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(settings, server, spoil, message):
    server.faults += [spoil]
    with pytest.raises(UserError, match=f"--teacher: .*as vLLM does .*{message}"):
        capture(changed(settings, concurrency=1), None, SHARD)
    assert files_of(settings.output) == {}


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", "a\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(settings, server, monkeypatch, key):
    monkeypatch.setenv("INDRA_API_KEY", key)
    with pytest.raises(UserError) as refused:
        capture(settings, None, SHARD)
    assert str(refused.value) == "INDRA_API_KEY: got a key; must be of printable ASCII characters only"
    assert not server.times


def test_a_key_may_end_with_a_line_end(settings, server, monkeypatch):
    monkeypatch.setenv("INDRA_API_KEY", "secret\r\n")
    assert capture(settings, None, SHARD).positions_asked > 0


def test_refusals_are_not_retried(settings, server):
    server.faults += [400]
    with pytest.raises(UserError, match=r"--teacher: .*refuses the request \(status 400"):
        capture(changed(settings, concurrency=1), None, SHARD)
    assert len(server.times) <= 2  # the next may have been under way


@pytest.mark.parametrize(
    ("changes", "field"), [({"kind": "sampled"}, "--kind"), ({"kind": "full"}, "--kind"),
                           ({"temperature": 2.0}, "--temperature"), ({"workers": 2}, "--workers")]
)  # fmt: skip
def test_what_a_server_cannot_give_is_refused(settings, changes, field):
    with pytest.raises(UserError, match=f"^{field}: "):
        capture(changed(settings, **changes), None, SHARD)


def test_another_model_name_is_refused(settings):
    capture(settings, None, SHARD)
    with pytest.raises(UserError, match=r"^--teacher: .* teacher_sha256"):
        capture(changed(settings, served_model="other"), None, SHARD)


def test_the_rate_limit_holds(settings, monkeypatch):
    """Five requests at one moment, and two more after they have all gone."""
    clock, waits = types.SimpleNamespace(now=100.0), []
    client = types.SimpleNamespace(request=lambda *_, **__: types.SimpleNamespace(status_code=200, json=dict))
    monkeypatch.setattr(served.time, "monotonic", lambda: clock.now)
    requests = served._Requests(changed(settings, requests_per_second=4), client)
    monkeypatch.setattr(requests.stopped, "wait", waits.append)
    for now in [100.0] * 5 + [103.0] * 2:
        clock.now = now
        requests.json("POST", "/completions", {})
    assert waits == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_capture_whose_server_never_answers(world, tmp_path, number, status):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        options = [
            f"--data={world.data}", f"--output={tmp_path / 'signals'}", "--kind=topk", "--served-model=tiny",
            f"--teacher=http://127.0.0.1:{silent.getsockname()[1]}/v1",
        ]  # fmt: skip
        with subprocess.Popen([sys.executable, "-m", "indraquantum", "capture", *options]) as child:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(1 << 16).startswith(b"POST /v1/completions ")
                child.send_signal(number)
                try:
                    assert child.wait(60) == status
                finally:
                    child.kill()
    assert files_of(tmp_path / "signals") == {}


def test_requests_that_nobody_waits_for_any_more_are_not_repeated(settings):
    requests, asked = served._Requests(settings, None), []

    def refuse(*_, **__):
        asked.append(1)
        requests.stopped.set()
        return types.SimpleNamespace(status_code=503, text="", headers={"retry-after": "600"})

    requests._client = types.SimpleNamespace(request=refuse)
    with pytest.raises(UserError, match=r"--teacher: got \S+; failed 8 times \(status 503: \)"):
        requests.json("POST", "/completions", {})
    assert len(asked) == 1


def test_entropy_bounds_hold_for_random_distributions_and_meet_at_the_ends():
    draw = np.random.default_rng(0)
    for concentration in (0.01, 0.1, 1.0, 10.0):
        probs_NV = draw.dirichlet(np.full(23, concentration), 50).clip(1e-300)
        entropy_N = -(probs_NV * np.log(probs_NV)).sum(1)
        for k in (1, 5, 22, 23):
            low_N, high_N = entropy_bounds(np.log(np.sort(probs_NV, 1)[:, -k:]), 23)
            assert (low_N <= entropy_N + 1e-9).all()
            assert (high_N >= entropy_N - 1e-9).all()
            if k >= 22:
                np.testing.assert_allclose(low_N, high_N, atol=1e-9)
    low, high = entropy_bounds(np.full((1, 4), -np.log(16)), 16)  # a uniform distribution is the only one left
    np.testing.assert_allclose([low, high], np.log(16))
