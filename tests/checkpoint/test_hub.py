"""Checkpoints named `owner/name`, from a stand-in for the Hugging Face Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import mplug2_fast as mf
from mplug2_fast.checkpoint.source import vocabulary_path
from mplug2_fast.errors import CheckpointError

pytest.importorskip("huggingface_hub")
TINY = Path(mf.__file__).parent / "data" / "tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, owner/tiny, with a branch `v2`."""

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append(self.path)
        if "owner" in parts and "tiny" in parts and parts[0] == "api":
            files = [path.name for path in TINY.iterdir()]
            listed = [{"type": "file", "path": n, "size": (TINY / n).stat().st_size, "oid": "0" * 40} for n in files]
            body = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(listed if "tree" in parts else body).encode(), Content_Type="application/json")
        elif parts[:3] == ["owner", "tiny", "resolve"] and (TINY / parts[-1]).exists():
            body = (TINY / parts[-1]).read_bytes()
            self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self._send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def here(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_name_loads_as_its_files_do(hub):
    model = mf.from_pretrained("owner/tiny", pack=False)
    expected = mf.from_pretrained(TINY, pack=False).official_parameters()
    assert all((p == expected[name]).all() for name, p in model.official_parameters().items())
    assert vocabulary_path("owner/tiny").read_bytes() == (TINY / "vocab.txt").read_bytes()
    assert mf.checkpoint.inspect("owner/tiny@v2").ok
    assert any("v2" in path for path in hub.asked)


def test_a_folder_of_that_name_comes_first(tmp_path):
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"owner/tiny: a checkpoint directory has config\.json"):
        mf.from_pretrained("owner/tiny")


def test_a_name_that_does_not_exist():
    with pytest.raises(
        CheckpointError, match="owner/none: no such file or directory, and the Hugging Face Hub"
    ) as error:
        mf.from_pretrained("owner/none")
    assert len(str(error.value).splitlines()) == 1
