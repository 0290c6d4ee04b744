"""From the hub to the cache: through a small hub on this machine. Broken downloads go on, offline means offline."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from zoo.registry import ZooError, require_revision
from zoo.storage.weights import local_folder, weight_files

COMMIT, ETAG = "c" * 40, "e" * 40
LARGE = bytes(range(256)) * (45 << 10)  # 11.25 MB; the library keeps what came in pieces of 10
FILES = {"config.json": b'{"slots": {}}', "model.safetensors": LARGE, "run.py": b"print('no')"}
KEPT = 10 << 20  # bytes


@pytest.fixture
def hub():
    """Its address, and what was asked of it: (path, range). The first answer with weights breaks off."""
    asked: list[tuple[str, str | None]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if self.command == "GET":
                asked.append((self.path, self.headers.get("Range")))
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/api/"):
                found = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
                if "/tree/" in self.path:
                    found = [{"type": "file", "path": n, "size": len(d), "oid": COMMIT} for n, d in FILES.items()]
                return self.answer(json.dumps(found).encode(), {"Content-Type": "application/json"})
            if name not in FILES:
                return self.answer(b"", {}, 404)
            data, more, status = FILES[name], {"ETag": f'"{name[0]}{ETAG[1:]}"', "X-Repo-Commit": COMMIT}, 200
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                more |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                data, status = data[start:], 206
            return self.answer(data, more, status)

        def answer(self, data, headers, status=200):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                broken = len(data) == len(LARGE) and sum("safetensors" in path for path, _ in asked) == 1
                self.wfile.write(data[: KEPT + 999] if broken else data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from zoo.storage.weights import local_folder
for name in sys.argv[1:]:
    try:
        print(local_folder(name))
    except Exception as error:
        print(str(error).replace("\\n", " "))
"""


def fetched(home, *names, **env):
    """What a fresh process says the folders of these names are, or why not; the hub's settings are read at import."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env = {**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **env}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", FETCH, *names], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_broken_download_goes_on_and_offline_means_offline(hub, tmp_path):
    address, asked = hub
    folder = Path(*fetched(tmp_path, "org/tiny", HF_ENDPOINT=address))
    assert folder.name == COMMIT and folder.is_relative_to(tmp_path), folder
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}, "no code is fetched"
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert [r for path, r in asked if "safetensors" in path] == [None, f"bytes={KEPT}-"], "asked for the rest only"
    assert not any("run.py" in path for path, _ in asked)
    asked.clear()
    there, refused = fetched(tmp_path, "org/tiny", "org/other", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert there == str(folder) and "not in the cache and cannot be fetched" in refused
    assert not asked


@pytest.mark.parametrize("name", ["/etc", "../x", "a/../b", "a/b/c", "org/.."])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "/etc":
        name = "/no/such/folder"
    with pytest.raises(ZooError, match=r"is not a hub name|cannot be fetched"):
        local_folder(name)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", "a b", "x\n", ".hidden", "refs//x"])
def test_revisions_that_lead_elsewhere_are_refused(revision):
    with pytest.raises(ZooError, match="revision must be a branch, a tag or a commit"):
        local_folder("org/tiny", revision)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "a" * 40, "feature/x-1", None, ""])
def test_revisions_that_are_some(revision):
    assert require_revision(revision) == (revision or None)


ODD = ["../x.safetensors", "..", "/etc/passwd", 3, "x.bin"]


@pytest.mark.parametrize("index", ["no json", "[]", "{}", {"weight_map": []}, *({"weight_map": {"a": o}} for o in ODD)])
def test_lists_of_files_that_lead_elsewhere_are_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(ZooError, match=r"not an index of weights|not a safetensors file of its folder"):
        weight_files(tmp_path)
