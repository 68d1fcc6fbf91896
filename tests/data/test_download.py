"""Downloads of the official archives, from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ppo_nlu.config import DataConfig
from ppo_nlu.data import __main__ as data_program
from ppo_nlu.data import download, load_split, locate
from ppo_nlu.data.archives import ARCHIVES, Archive, archive_of
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import cli
from ppo_nlu.tasks import TASKS, get_task
from tests.data.files import FILES, SST2, fill, says

SUMS = {
    name: (text.count("\n") - 1, hashlib.sha256(text.encode()).hexdigest())
    for name, text in FILES.items()
}


def _zip(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in members.items():
            bundle.writestr(name, text)
    return buffer.getvalue()


GOOD = _zip({f"SST-2/{name}": text for name, text in FILES.items()} | {"../evil.txt": "!"})
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers every GET with the given function; returns its address."""
    monkeypatch.setitem(ARCHIVES, "glue/SST-2", Archive("SST-2.zip", SUMS))
    servers = []

    def start(respond: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)  # type: ignore[attr-defined]
                respond(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.asked = []  # type: ignore[attr-defined]
        start.asked = server.asked  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/glue"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _send(content: bytes, length: int | None = None) -> Answer:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def _left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("address", ["{}", "{}/", "{}/SST-2.zip"])
def test_a_good_archive_is_kept_in_the_cache(tmp_path: Path, serve, address: str) -> None:
    cache = tmp_path / "new" / "cache"
    url = address.format(serve(_send(GOOD)))
    cfg = DataConfig(cache=str(cache), url=url)
    source = locate(SST2, cfg)
    assert (source.kind, source.folder) == ("download", cache / "glue" / "SST-2")
    assert _left(tmp_path) == [f"new/cache/glue/SST-2/{name}" for name in sorted(FILES)]
    assert all((cache / "glue/SST-2" / n).read_text() == text for n, text in FILES.items())
    assert locate(SST2, cfg).kind == "cache"
    assert serve.asked == ["/glue/SST-2.zip"]
    assert load_split(SST2, "dev", cfg).examples[0].label == "Positive"


def _stall(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


def _stall_midway(handler: BaseHTTPRequestHandler) -> None:
    _send(GOOD[:100], len(GOOD))(handler)
    time.sleep(5)


def _missing(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(404)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def _to_a_local_file(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/hostname")
    handler.end_headers()


def _changed(**changed: str) -> bytes:
    return _zip({f"SST-2/{n}": changed.get(n[:-4], text) for n, text in FILES.items()})


# The first member's data begin at byte 45, behind 30 bytes of header and the name.
BROKEN = GOOD[:45] + b"\xff" + GOOD[46:]
RENAMED = GOOD.replace(b"train", b"drain", 1)
FAILURES: dict[str, tuple[Answer, str]] = {
    "cut off": (_send(GOOD[:-50], len(GOOD)), "cut off after"),
    "no zip": (_send(b"<html>log in first</html>"), "not a zip file"),
    "half a zip": (_send(GOOD[:-50]), "not a zip file"),
    "damaged": (_send(BROKEN), "SST-2/train.tsv: Error -3"),
    "renamed": (_send(RENAMED), "SST-2/train.tsv"),
    "rows": (_send(_changed(dev=FILES["dev.tsv"] * 2)), "SST-2/dev.tsv has 3 rows, not 1"),
    "sum": (_send(_changed(dev=FILES["dev.tsv"].replace("good", "bad!"))), "sha256"),
    "member": (_send(_zip({"SST-2/train.tsv": FILES["train.tsv"]})), "no SST-2/dev.tsv"),
    "404": (_missing, "404: Not Found"),
    "hang up": (_hang_up, "without response"),
    "silence": (_stall, "no answer within 0.3 s"),
    "stall": (_stall_midway, "timed out"),
    "redirect": (_to_a_local_file, "not allowed"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_download_leaves_nothing_and_the_stand_in_says_why(
    tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name in ("silence", "stall"):
        monkeypatch.setattr(download, f"{'OPEN' if name == 'silence' else 'STALL'}_SECONDS", 0.3)
    respond, reason = FAILURES[name]
    cfg = DataConfig(cache=str(tmp_path), url=serve(respond), fallback="bundled")
    start = time.monotonic()
    source = locate(SST2, cfg)
    assert time.monotonic() - start < 4  # the server would sleep for 5
    assert (source.kind, source.folder) == ("bundled", None)
    for part in ("stand-in", "not SST-2", "download failed", reason, cfg.url):
        assert part in source.note
    assert "\n" not in source.note
    assert _left(tmp_path) == [] and os.listdir(tmp_path / "glue") == []
    locate(SST2, cfg)
    assert len(serve.asked) == 1  # one try a process


def test_the_time_limits_are_short() -> None:
    assert download.OPEN_SECONDS <= 3 and download.STALL_SECONDS <= 10


def test_an_archive_without_end_is_given_up(
    tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        ARCHIVES, "glue/SST-2", replace(ARCHIVES["glue/SST-2"], mebibytes=50 / 2**20)
    )
    cfg = DataConfig(cache=str(tmp_path), url=serve(_send(GOOD)), fallback="bundled")
    assert "cannot be right" in locate(SST2, cfg).note
    assert _left(tmp_path) == []


def test_a_refused_connection_and_a_wrong_address_are_failures(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError) as error:
            locate(SST2, DataConfig(cache=str(tmp_path), url=url))
    says(error, "data.path", "$PPO_NLU_DATA", str(tmp_path), "refused", "glue/SST-2", "fallback")
    for url in ("nonsense", "http://[", "http://a b"):
        cfg = DataConfig(cache=str(tmp_path), url=url, fallback="bundled")
        assert "download failed" in locate(SST2, cfg).note


@pytest.mark.parametrize(
    "url",
    ["file:///etc", "FILE:///etc", "ftp://host/x", "data:,x", "URL:file:///etc", "<file:///etc>",
     " file:///etc", "\x1bfile:///etc", "localhost:8000/glue"],
)  # fmt: skip
def test_only_the_web_is_asked(tmp_path: Path, url: str) -> None:
    """A file beside the official layout must not be taken for a download."""
    (tmp_path / "SST-2.zip").write_bytes(GOOD)
    for text in (url, url.replace("/etc", str(tmp_path))):
        cfg = DataConfig(cache=str(tmp_path / "cache"), url=text, fallback="bundled")
        with pytest.raises(UserError, match=r"data\.url: .* is not a web address") as error:
            locate(SST2, cfg)
        assert str(error.value).isprintable()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://ann:s3cret@127.0.0.1:1/glue", "http://ann:***@127.0.0.1:1/glue/SST-2.zip"),
        ("http://ann:s3cret@127.0.0.1/glue", "http://ann:***@127.0.0.1/glue/SST-2.zip"),
        ("http://ann:s3@cret@127.0.0.1/glue", "http://ann:***@127.0.0.1/glue/SST-2.zip"),
        ("http://ann:s3/cret@127.0.0.1/glue", "http://ann:***@127.0.0.1/glue/SST-2.zip"),
        ("http://s3cret@127.0.0.1:1/glue", "http://***@127.0.0.1:1/glue/SST-2.zip"),
        ("file://ann:s3cret@127.0.0.1/glue", "file://ann:***@127.0.0.1/glue"),
        ("http://127.0.0.1:1/a@b", "http://127.0.0.1:1/a@b/SST-2.zip"),
        ("http://127.0.0.1:1/\x1b[31m", "http://127.0.0.1:1/\\x1b[31m/SST-2.zip"),
    ],
)
def test_no_message_shows_a_password_or_steers_the_terminal(
    tmp_path: Path, url: str, shown: str
) -> None:
    with pytest.raises(UserError) as error:
        locate(SST2, DataConfig(cache=str(tmp_path), url=url))
    message = str(error.value)
    assert shown in message and message.isprintable()
    assert not any(part in message for part in ("s3cret", "s3@", "s3/", "cret@", "'cret"))


def test_a_cache_that_cannot_be_used_is_a_failure(tmp_path: Path, serve) -> None:
    url = serve(_send(GOOD))
    (tmp_path / "file").write_text("x")
    cfg = DataConfig(cache=str(tmp_path / "file"), url=url, fallback="bundled")
    assert locate(SST2, cfg).kind == "bundled"
    (tmp_path / "full/glue/SST-2/mine").mkdir(parents=True)  # no data, but not ours to remove
    cfg = DataConfig(cache=str(tmp_path / "full"), url=url, fallback="bundled")
    assert "in the way" in locate(SST2, cfg).note
    assert _left(tmp_path) == ["file"] and (tmp_path / "full/glue/SST-2/mine").is_dir()


def test_another_process_may_be_first(tmp_path: Path, serve) -> None:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        fill(tmp_path / "glue/SST-2")
        _send(GOOD)(handler)

    source = locate(SST2, DataConfig(cache=str(tmp_path), url=serve(respond)))
    assert source.kind == "download" and len(_left(tmp_path)) == 3


# ---- archives of every kind

CB_ROW = '{"premise": "a", "hypothesis": "b", "label": "neutral", "idx": %d}\n'
CB_FILES = {"train.jsonl": CB_ROW % 0 + CB_ROW % 1, "val.jsonl": CB_ROW % 0, "test.jsonl": ""}


def _serve_paths(files: dict[str, bytes]) -> Answer:
    """Answers with the content of the path, or 404."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        content = files.get(handler.path)
        _missing(handler) if content is None else _send(content)(handler)

    return respond


def test_superglue_is_beside_glue_and_counts_do_where_no_sum_is_known(
    tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ARCHIVES["superglue/CB"].name
    assert download.address_of(ARCHIVES["superglue/CB"], DataConfig().url) == (
        "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/CB.zip"
    )
    rows = {"train.jsonl": (2, ""), "val.jsonl": (1, ""), "test.jsonl": (0, "")}
    monkeypatch.setitem(ARCHIVES, "superglue/CB", Archive(address, rows))
    packed = _zip({f"CB/{name}": text for name, text in CB_FILES.items()})
    url = serve(_serve_paths({"/glue/superglue/data/v2/CB.zip": packed})) + "/data"
    fetched = download.fetch(get_task("cb"), url, tmp_path)
    assert fetched.folder == tmp_path / "superglue/CB"
    assert fetched.unverified == ("train.jsonl", "val.jsonl", "test.jsonl")
    cfg = DataConfig(cache=str(tmp_path))
    assert len(load_split(get_task("cb"), "train", cfg).examples) == 2
    monkeypatch.setitem(ARCHIVES, "superglue/CB", Archive(address, rows | {"val.jsonl": (2, "")}))
    with pytest.raises(download.DownloadError, match=r"CB/val\.jsonl has 1 rows, not 2"):
        download.fetch(get_task("cb"), url, tmp_path / "other")


def test_a_known_sum_must_agree_unless_told_otherwise(tmp_path: Path, serve) -> None:
    changed = _changed(dev=FILES["dev.tsv"].replace("good", "bad!"))
    url = serve(_send(changed))
    with pytest.raises(download.DownloadError, match=r"SST-2/dev\.tsv is not the official file"):
        download.fetch(SST2, url, tmp_path)
    assert len(download.fetch(SST2, url, tmp_path, check_sums=False).unverified) == 3


def test_a_large_archive_is_fetched_only_when_asked_for(tmp_path: Path, serve) -> None:
    url = serve(_missing)
    large = [name for name, archive in ARCHIVES.items() if not archive.automatic]
    assert large == ["glue/QQP", "glue/MNLI", "superglue/ReCoRD"]
    with pytest.raises(UserError, match=r"MNLI.zip is large.*python -m ppo_nlu.data get mnli"):
        locate(get_task("mnli"), DataConfig(cache=str(tmp_path), url=url))
    assert serve.asked == []
    with pytest.raises(download.DownloadError, match="404"):
        download.fetch(get_task("mnli"), url, tmp_path)
    assert ARCHIVES["glue/MNLI"].mebibytes > 312 and ARCHIVES["glue/SST-2"].mebibytes == 64


def test_ax_is_one_plain_file(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHIVES, "glue/AX", Archive("AX.tsv", {"AX.tsv": (1, "")}))
    text = b"index\tsentence1\tsentence2\n0\ta\tb\n"
    url = serve(_serve_paths({"/glue/AX.tsv": text}))
    assert download.fetch(get_task("ax"), url, tmp_path).folder == tmp_path / "glue/AX"
    examples = load_split(get_task("ax"), "test", DataConfig(cache=str(tmp_path))).examples
    assert examples[0].fields == {"premise": "a", "hypothesis": "b"}


MRPC_HEAD = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
MRPC_ROWS = [f'{n % 2}\t{n}\t{n + 100}\tone "{n}\ttwo {n}\n' for n in range(20)]


@pytest.mark.parametrize("known", [True, False])
def test_mrpc_is_divided_by_the_official_ids(
    tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setitem(
        ARCHIVES, "glue/MRPC", Archive(ARCHIVES["glue/MRPC"].name, {"test.tsv": (2, "")})
    )
    senteval = "/senteval/senteval_data/msr_paraphrase_"
    files = {
        f"{senteval}train.txt": (MRPC_HEAD + "".join(MRPC_ROWS)).encode(),
        f"{senteval}test.txt": (MRPC_HEAD + "".join(MRPC_ROWS[:2])).encode(),
    }
    if known:
        files["/glue/data/mrpc_dev_ids.tsv"] = b"3\t103\n5\t105\n"
    mrpc, url = get_task("mrpc"), serve(_serve_paths(files)) + "/data"
    download.fetch(mrpc, url, tmp_path)
    cfg = DataConfig(cache=str(tmp_path))
    train, dev, test = (load_split(mrpc, name, cfg) for name in mrpc.files)
    assert len(train.examples) == 18
    firsts = [row.fields["sentence1"] for row in dev.examples]
    assert firsts == (['one "3', 'one "5'] if known else ['one "9', 'one "19'])
    assert [(row.id, row.label) for row in test.examples] == [("0", None), ("1", None)]
    assert train.partial == dev.partial == (not known)
    if not known:
        assert "dev.own_split.tsv, 2 rows" in dev.note


def test_every_archive_is_one_of_a_task_and_holds_its_files() -> None:
    used = set()
    for name, spec in TASKS.items():
        archive = archive_of(spec)
        assert (archive is None) == (spec.benchmark == "extra"), name
        if archive is None:
            continue
        used.add(archive.name)
        wanted = {names[0] for names in spec.files.values()}
        if name not in ("mrpc", "ax"):  # made of other files
            # The two halves of MNLI come in one archive.
            assert wanted <= set(archive.files), name
        assert all(len(digest) in (0, 64) for _, digest in archive.files.values())
    assert used == {archive.name for archive in ARCHIVES.values()}


# ---- the program


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(data_program.main, list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_get_says_where_the_files_are_and_how_they_were_checked(
    tmp_path: Path, serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"data.url={serve(_send(GOOD))}"
    target = tmp_path / "new"
    code, out, _ = _run(capsys, "get", "sst2", url, "--output", str(target))
    assert code == 0 and str(target / "glue/SST-2") in out and "(verified by checksum)" in out
    code, out, _ = _run(capsys, "get", "SST-2", url, "--output", str(target))
    assert code == 0 and "holds it already" in out and len(serve.asked) == 1
    (target / "glue/SST-2/dev.tsv").unlink()
    code, _, err = _run(capsys, "get", "sst2", url, "--output", str(target))
    assert code == 2 and "not the whole official set" in err and err.count("\n") == 1
    code, out, _ = _run(capsys, "get", "sst2", url, f"data.cache={tmp_path / 'cache'}")
    assert code == 0 and str(tmp_path / "cache/glue/SST-2") in out


def test_get_names_what_was_not_verified_and_what_went_wrong(
    tmp_path: Path, serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"data.url={serve(_send(_changed(dev=FILES['dev.tsv'].replace('good', 'bad!'))))}"
    here = ("sst2", url, "--output", str(tmp_path))
    code, _, err = _run(capsys, "get", *here)
    assert code == 2 and "sha256" in err and "--unverified" in err
    code, out, _ = _run(capsys, "get", "--unverified", *here)
    assert code == 0 and "not verified by checksum: train.tsv, dev.tsv, test.tsv" in out
    for words, part in ((("snli",), "no archive of SNLI"), ((), "get"), (("sst3",), "sst2")):
        code, _, err = _run(capsys, "get", *words)
        assert code == 2 and part in err


def test_check_shows_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "glue/SST-2")
    (tmp_path / "glue/SST-2/train.tsv").write_text("sentence\tlabel\nfine\t1\nodd\nbad\t0\n")
    (tmp_path / "glue/SST-2/test.tsv").unlink()
    (tmp_path / "glue/STS-B").mkdir()
    scored = "sentence1\tsentence2\tscore\na\tb\t1.0\nc\td\t4.5\n"
    (tmp_path / "glue/STS-B/dev.tsv").write_text(scored)
    code, out, err = _run(capsys, "check", f"data.path={tmp_path}")
    assert code == 0 and err == ""
    lines = [line.split() for line in out.splitlines()]
    train = next(line for line in lines if line[:2] == ["sst2", "train"])
    assert train[2:9] == ["train.tsv", "2", "Positive", "1,", "Negative", "1", "1"]
    assert next(line for line in lines if line[:2] == ["sst2", "test"])[-1] == "absent"
    assert "1 / 2.75 / 4.5 (min/mean/max)" in out
    assert "absent: mnli, mnli-mm, " in out
    monkeypatch.setenv("PPO_NLU_DATA", str(tmp_path))
    code, out, _ = _run(capsys, "check", "sst2")
    assert code == 0 and "stsb" not in out
    code, _, err = _run(capsys, "check", "cola")
    assert code == 2 and "CoLA" in err and err.count("\n") == 1
    monkeypatch.delenv("PPO_NLU_DATA")
    for words, part in (
        (("cola",), "get cola"),
        ((), "no task is there"),
        (("data.pth=x",), "data.path"),
    ):
        code, _, err = _run(capsys, "check", *words)
        assert code == 2 and part in err and err.count("\n") == 1


def test_check_of_a_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t7\n")
    code, _, err = _run(capsys, "check", "sst2", f"data.path={tmp_path}")
    assert code == 2 and "dev.tsv:2" in err and "'7'" in err


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ppo_nlu.data", "check", "cola"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "get cola" in done.stderr and done.stdout == ""
