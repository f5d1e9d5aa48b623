"""The hub, played by a server on this machine: what it and the network between may answer, and what is kept then."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

import convert_hf_checkpoint
import download
from conftest import ROOT, call

COMMIT = "1" * 40
PAGE = b"<html><body>Please log in to this network</body></html>"


def git_blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """files: {name: content} of the one repository a/b. break_it(handler): answers a request, or returns False."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = dict(files)
        self.break_it = lambda handler: False
        self.seen = []  # (method, path, Range)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def listing(self):
        siblings = []
        for name, data in self.files.items():
            entry = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
            if name.endswith((".safetensors", ".bin")):
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}}
            siblings.append(entry)
        return {"id": "a/b", "modelId": "a/b", "sha": COMMIT, "siblings": siblings}

    def etag(self, name):
        data = self.files[name]
        return sha256(data) if name.endswith((".safetensors", ".bin")) else git_blob(data)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        headers = {"Content-Length": len(data), **{name.replace("_", "-"): value for name, value in headers.items()}}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_GET(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Range")))
        if self.server.break_it(self):
            return
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/old/name"):
            self.answer(307, Location=self.path.replace("old/name", "a/b"))
        elif path in ("/api/models/a/b", "/api/models/a/b/revision/main"):
            self.answer(200, json.dumps(self.server.listing()).encode(), Content_Type="application/json")
        elif path.startswith("/old/name/"):
            self.answer(307, Location=self.path.replace("old/name", "a/b"))
        elif path.startswith(f"/a/b/resolve/{COMMIT}/"):
            self.file(path.rpartition("/")[2])
        else:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def file(self, name):
        data = self.server.files[name]
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        more = {"Content_Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        etag = f'"{self.server.etag(name)}"'
        self.answer(206 if begin else 200, data[begin:], ETag=etag, X_Repo_Commit=COMMIT, **more)

    def cut(self, name, after):
        """Begin to send a file, then close the connection."""
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:after])
        self.wfile.flush()
        self.close_connection = True


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 1000,
    "pytorch_model.bin": b"pickle",
    "README.md": b"# A model",
    "original/params.json": b"{}",
}
TAKEN = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that download.py talks to, without pauses; what it downloads goes to tmp_path."""
    server = Hub(FILES)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(download, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def run(repo="a/b"):
    return call(download.main, "--", repo)


def in_folder(folder):
    return sorted(path.name for path in folder.glob("*") if path.is_file())


def error_line(result):
    """The one line that a failed command ended with."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and result.stderr.endswith(lines[0] + "\n"), result
    assert "Traceback" not in result.stderr
    return lines[0]


def always(status, data=b"", **headers):
    """A breaker: every request is answered so."""

    def answer(handler):
        handler.answer(status, data, **headers)
        return True

    return answer


def only(breaker, part, method="GET"):
    """A breaker for requests whose path has a part."""
    return lambda handler: part in handler.path and handler.command == method and breaker(handler)


def fetched(server):
    return [path.rpartition("/")[2] for method, path, _ in server.seen if method == "GET" and "/resolve/" in path]


def test_what_a_conversion_needs_is_fetched_once(hub, tmp_path):
    assert run().returncode == 0
    assert in_folder(tmp_path / "a/b") == TAKEN == sorted(fetched(hub))
    assert all((tmp_path / "a/b" / name).read_bytes() == FILES[name] for name in TAKEN)
    hub.seen.clear()
    assert run().returncode == 0 and not fetched(hub)


def test_pickles_are_taken_where_there_is_nothing_else(hub, tmp_path):
    hub.files["original/model.safetensors"] = hub.files.pop("model.safetensors")
    assert run().returncode == 0
    assert {"pytorch_model.bin", "config.json"} <= set(fetched(hub)) and "model.safetensors" not in fetched(hub)


def test_a_renamed_repository_is_found(hub, tmp_path):
    assert run("old/name").returncode == 0
    assert in_folder(tmp_path / "old/name") == TAKEN


def to_login(handler):
    """A captive portal that redirects to its page."""
    if handler.path == "/login":
        handler.answer(200, PAGE, Content_Type="text/html")
    else:
        handler.answer(302, Location="/login")
    return True


def huge(handler):
    if "/api/models" not in handler.path:
        return False
    listing = handler.server.listing()
    listing["siblings"][2]["size"] = 10**18
    handler.answer(200, json.dumps(listing).encode())
    return True


PORTAL = always(200, PAGE, Content_Type="text/html")
GATED = always(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model a/b is restricted")


@pytest.mark.parametrize(
    "breaker,words",
    [
        (PORTAL, "the answer is not the hub's; log in to the network"),
        (to_login, "the answer is not the hub's; log in to the network"),
        (always(200, b"{}"), "the answer is not the hub's"),
        (only(PORTAL, "/resolve/", "HEAD"), "the answer is not the hub's"),
        (only(PORTAL, "/resolve/"), "run the command again to resume"),
        (always(500), "out of order (status 500); run the command again later to resume"),
        (only(always(503), "model.safetensors", "HEAD"), "out of order (status 503)"),
        (only(always(503), "model.safetensors"), "out of order (status 503)"),
        (always(429), "busy or out of order (status 429)"),
        (GATED, "access is gated; accept its licence at https://huggingface.co/a/b"),
        (only(GATED, "/resolve/", "HEAD"), "access is gated; accept its licence"),
        (always(401, X_Error_Message="Invalid credentials in Authorization header"), "the hub refused the token"),
        (always(401, X_Error_Code="RepoNotFound"), "no such repository on the hub, or it is private"),
        (always(404, X_Error_Code="RepoNotFound"), "no such repository on the hub, or it is private"),
        (always(404), "no such repository on the hub, or it is private"),
        (always(403), "no token with access was given"),
        (huge, "GB; make room"),
        (only(lambda handler: handler.cut("model.safetensors", 0) or True, "model.safetensors"), "again to resume"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_next_try_succeeds(breaker, words, hub, tmp_path):
    hub.break_it = breaker
    line = error_line(run())
    assert line.startswith("error: a/b: ") and words in line
    kept = in_folder(tmp_path / "a/b")
    assert all((tmp_path / "a/b" / name).read_bytes() == FILES[name] for name in kept)
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.break_it = lambda handler: False
    hub.seen.clear()
    assert run().returncode == 0
    assert sorted(fetched(hub) + kept) == in_folder(tmp_path / "a/b") == TAKEN


@pytest.mark.parametrize("repo", ["a b", "a/b/c", "", "/a", "..", "../a", "a/..", "ä/b", "--help", "x\ny", "a" * 200])
def test_odd_names_are_one_line(repo, hub, tmp_path):
    line = error_line(run(repo))
    assert line.startswith(f"error: {repo!r}: neither a folder nor a repository's name")
    assert not hub.seen and not list(tmp_path.iterdir())


def test_a_repository_without_weights_is_one_line(hub, tmp_path):
    hub.files = {"config.json": b"{}", "model.gguf": b"GGUF"}
    assert "a/b: has no *.safetensors or *.bin" in error_line(run())
    assert not list(tmp_path.iterdir())


def test_a_cut_file_goes_on_where_it_was_cut(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # less is lost
    once = [1000]
    hub.break_it = only(lambda handler: once and (handler.cut("model.safetensors", once.pop()) or True), "model.saf")
    assert run().returncode == 0
    assert (tmp_path / "a/b/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [where for _, path, where in hub.seen if "model.safe" in path] == [None, None, "bytes=1000-"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("bad", [PAGE, b"", "cut", "changed"])
def test_what_was_damaged_since_is_fetched_again(name, bad, hub, tmp_path):
    """As old as it was: huggingface_hub itself looks at times only."""
    assert run().returncode == 0
    path = tmp_path / "a/b" / name
    before = path.stat()
    data = FILES[name]
    path.write_bytes({"cut": data[:-1], "changed": b"!" + data[1:]}.get(bad, bad))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hub.seen.clear()
    assert run().returncode == 0 and fetched(hub) == [name] and path.read_bytes() == data


def test_what_comes_damaged_is_not_kept(hub, tmp_path):
    """Here of the right size: nothing else would notice it."""
    data = FILES["model.safetensors"]
    hub.break_it = only(always(200, b"!" + data[1:]), "model.safetensors")
    assert "a/b: model.safetensors came damaged, and was deleted; run the command again" in error_line(run())
    assert not (tmp_path / "a/b/model.safetensors").exists()
    hub.break_it = lambda handler: False
    assert run().returncode == 0 and (tmp_path / "a/b/model.safetensors").read_bytes() == data


def test_a_full_disk_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(
        download, "hf_hub_download", lambda *args, **how: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    )
    assert "No space left on device); make room" in error_line(run())


def test_a_second_run_waits_for_its_turn(hub, tmp_path):
    from files import locked

    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a/b"):
        assert "is writing it; wait until it has ended" in error_line(run())


def test_offline_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "a/b: HF_HUB_OFFLINE is set: unset it" in error_line(run())


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("ALL_PROXY", "nonsense://x", "see whether ALL_PROXY is right"),
        ("http_proxy", "http://host:port", "see whether http_proxy is right"),
        ("http_proxy", "http://127.0.0.1:1", "refused); see whether http_proxy is right"),
        ("HF_TOKEN", "ä", "see whether HF_TOKEN is right"),
    ],
)
def test_odd_settings_are_named(name, value, words, hub, monkeypatch):
    from huggingface_hub.utils import close_session

    for other in list(os.environ):
        if other.upper() in (*download.SETTINGS, "NO_PROXY"):
            monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    close_session()  # else it keeps the proxies that it began with
    try:
        assert words in error_line(run())
    finally:
        close_session()


def test_a_home_that_is_a_file_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    line = error_line(run())
    assert f"{tmp_path}/home/token can't be used (Not a directory); see whether" in line and "HF_HOME" in line


def prepare(scripts, url):
    environment = {**os.environ, "HF_ENDPOINT": url, "PYTHON": sys.executable, "no_proxy": "127.0.0.1"}
    return subprocess.Popen(
        [scripts / "prepare.sh", "a/b"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_prepare_resumes_after_it_was_killed(hf_folder, tmp_path):
    for path in (ROOT / "scripts").glob("*"):
        if path.suffix in (".sh", ".py"):
            (tmp_path / "scripts").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "scripts")
    for path in (*ROOT.glob("*.py"), ROOT / "kernels"):
        (tmp_path / path.name).symlink_to(path)
    source = hf_folder("llama3")[0]
    server = Hub({path.name: path.read_bytes() for path in sorted(source.iterdir()) if path.suffix != ".pth"})
    begun, go_on = threading.Event(), threading.Event()

    def stall(handler):
        handler.cut("model.safetensors", 1000)
        begun.set()
        go_on.wait(60)
        return True

    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    folder = tmp_path / "checkpoints/a/b"
    try:
        server.break_it = only(stall, "model.safetensors")
        process = prepare(tmp_path / "scripts", server.url)
        assert begun.wait(60)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        go_on.set()
        whole = in_folder(folder)
        assert "config.json" in whole and list(folder.rglob("*.incomplete"))
        server.break_it = lambda handler: False
        server.seen.clear()
        process = prepare(tmp_path / "scripts", server.url)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert (folder / "model.pth").is_file() and not set(whole) & set(fetched(server))
        assert not list(folder.rglob("*.incomplete"))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors", "..", ""])
def test_an_index_that_names_other_folders_is_refused(name, hf_folder, tmp_path):
    shutil.copytree(hf_folder("llama3")[0], tmp_path / "in", ignore=shutil.ignore_patterns("model.*"))
    for place in (tmp_path, tmp_path / "in", tmp_path / "in/sub"):  # there is a file for each of the names
        place.mkdir(exist_ok=True)
        shutil.copy(hf_folder("llama3")[0] / "model.safetensors", place)
    index = tmp_path / "in/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    line = error_line(call(convert_hf_checkpoint.main, "--checkpoint_dir", tmp_path / "in"))
    assert line.startswith(f"error: {index}: weight_map names {name!r}")
    assert not (tmp_path / "in/model.pth").exists()


@pytest.mark.parametrize("data", [PAGE, b"", None])
def test_damaged_weights_are_to_be_downloaded_again(data, hf_folder, tmp_path):
    shutil.copytree(hf_folder("llama3")[0], tmp_path / "in", ignore=shutil.ignore_patterns("model.pth", "model.json"))
    weights = tmp_path / "in/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if data is None else data)
    line = error_line(call(convert_hf_checkpoint.main, "--checkpoint_dir", tmp_path / "in"))
    assert f"{weights}: truncated or damaged; download the checkpoint again" in line
