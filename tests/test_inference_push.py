"""`indra export --push`: what reaches a hub is the folder, and a refusal is one line. The hub is a fake on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.training.loop import train


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


class Hub(ThreadingHTTPServer):
    """The calls of the hub's HTTP API that an upload makes. Large files go by LFS, the others into the commit."""

    def __init__(self, refuse=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuse, self.created, self.files, self.stored, self.tokens = refuse, [], {}, {}, set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[self.path.removeprefix("/lfs/")] = body
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.tokens.add(self.headers["Authorization"])
        if hub.refuse:
            return self.answer({"error": "no"}, hub.refuse)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer({"url": f"{hub.address}/me/model", "id": "me/model"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/me/model/preupload/main", self.path):
            asked = json.loads(body)["files"]
            mode = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
            return self.answer(
                {"files": [{"path": path, "uploadMode": mode[path], "shouldIgnore": False} for path in mode]}
            )
        if self.path == "/me/model.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}} for each in objects
            ]})  # fmt: skip
        if self.path.startswith("/api/models/me/model/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            return self.answer({"commitUrl": f"{hub.address}/me/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch):
    """Start a hub and let huggingface_hub take it for the real one."""
    from huggingface_hub import constants, hf_api

    servers = []

    def start(**options):
        server = Hub(**options)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        for module in (constants, hf_api):
            for name, value in {
                "ENDPOINT": server.address,
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,
            }.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    settings = TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, d_model=8, layers=1, heads=2,
        mlp_width=10, batch_tokens=480, max_steps=1, no_teacher=True,
    )  # fmt: skip
    return train(settings).checkpoint


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own call of httpx2
def test_the_hub_gets_the_folder(hub, checkpoint, tmp_path, capsys):
    server = hub()
    assert indra("export", checkpoint, tmp_path / "model", "--push", "me/model", "--private") == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert server.files == written
    assert server.stored.keys() == {hashlib.sha256(written["model.safetensors"]).hexdigest()}
    assert [each["name"] for each in server.created] == ["model"]
    assert server.created[0].get("private") or server.created[0].get("visibility") == "private"
    assert server.tokens == {"Bearer hf_secret"}
    assert f"It was uploaded to {server.address}/me/model." in capsys.readouterr().out


@pytest.mark.parametrize(("name", "refuse"), [("me/model", 401), ("me/model", 403), ("not a name!", None)])
def test_a_refusal_is_one_line_and_the_folder_is_complete(hub, checkpoint, tmp_path, capsys, name, refuse):
    server = hub(refuse=refuse)
    assert indra("export", checkpoint, tmp_path / "model", "--push", name) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"--push: got {name}; must be a repository you can write to" in said[-1]
    assert f"the model is complete in {tmp_path / 'model'}" in said[-1]
    assert (tmp_path / "model" / "SHA256SUMS").is_file()
    assert not server.files


def test_a_hub_out_of_reach_is_one_line(checkpoint, tmp_path, capsys):
    assert indra("export", checkpoint, tmp_path / "model", "--push", "me/model") == 2  # the tests are offline
    assert "--push: got me/model; must be" in capsys.readouterr().err.splitlines()[-1]
