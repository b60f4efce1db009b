"""Downloads from a real server that does everything wrong, and archives that mean harm."""

import hashlib
import json
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from project import announced, copy_project, snakemake

from lpovod.artifacts import read_json, sha256
from lpovod.catalogue import DRIVE, Remote
from lpovod.exceptions import LpovodError
from lpovod.published import content_of, remember
from lpovod.stages import download as stage
from lpovod.stages.download import download, download_coco, download_file, extract, extract_member

CONTENT = bytes(range(256)) * 1000
OTHER = CONTENT[::-1]
PICKLE, NEWER = b"\x80\x02" + CONTENT, b"\x80\x02" + OTHER
PAGE = "<!DOCTYPE html><html><title>Sign in</title></html>"
DISK_FULL = r"cannot be written: No space left on device\. Free some disk space and rerun"


@dataclass
class Server:
    """What it serves, how it misbehaves (one entry per request, then well), what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    tag: str | None = '"one"'
    answers: list[str] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    ranges: bool = True
    careless: bool = False  # sends a part of a file that has changed

    def remote(self, content: bytes = CONTENT) -> Remote:
        return Remote(self.url, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture()
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.headers.get("Range"))
            answer = state.answers.pop(0) if state.answers else ""
            if answer.isdigit():
                self.send_error(int(answer))
                return
            if answer.startswith("<"):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(answer.encode())
                return
            start, stop = 0, len(state.content)
            wanted = self.headers.get("Range") if state.ranges else None
            if wanted and (state.careless or self.headers.get("If-Range") == state.tag):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= stop:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{stop}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stop}")
            self.send_header("Content-Length", str(stop - start))
            # By both, gdown tells a file from a page.
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Disposition", 'attachment; filename="file"')
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            if answer == "cut":
                stop = start + (stop - start) // 2
            self.wfile.write(state.content[start:stop])

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{running.server_port}/file.zip"
    # Looks for its end every hundredth of a second, not every half.
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    running.shutdown()
    running.server_close()


def whole(path: Path, content: bytes = CONTENT) -> bool:
    """The file has its name and its content, and nothing else is left."""
    return path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_a_file_arrives_whole(server, tmp_path):
    download(server.remote(), tmp_path / "file")
    assert whole(tmp_path / "file")
    assert server.asked == [None]


def test_a_connection_cut_twice_resumes_where_it_was(server, tmp_path):
    server.answers = ["cut", "cut"]
    download(server.remote(), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")
    half, quarter = len(CONTENT) // 2, len(CONTENT) // 4
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_killed_download_goes_on_in_the_next_run(server, tmp_path):
    server.answers = ["cut", "404"]
    with pytest.raises(LpovodError):
        download(server.remote(), tmp_path / "file", pause=0)
    assert not (tmp_path / "file").exists()
    download(server.remote(), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")
    assert server.asked[-1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("tag", ['"two"', None], ids=["new tag", "no tag"])
def test_parts_of_two_versions_are_never_joined(server, tmp_path, tag, careless):
    server.answers = ["cut", "404"]
    with pytest.raises(LpovodError):
        download(server.remote(), tmp_path / "file", pause=0)
    server.content, server.tag, server.careless = OTHER, tag, careless
    download(server.remote(OTHER), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file", OTHER)


def test_a_server_that_sends_no_version_is_asked_for_everything_again(server, tmp_path):
    server.tag, server.answers = None, ["cut"]
    download(server.remote(), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")
    assert server.asked == [None, None]


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.ranges, server.answers = False, ["cut"]
    download(server.remote(), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")


@pytest.mark.parametrize("content", [CONTENT, CONTENT[:1000]], ids=["the same", "shorter"])
def test_nothing_left_to_send(server, tmp_path, content):
    """All bytes came, but the process was killed before the name was given: 416."""
    (tmp_path / ".file.partial").write_bytes(CONTENT)
    (tmp_path / ".file.version").write_text('"\\"one\\""')
    server.content = content
    download(server.remote(content), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file", content)


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.answers = ["503", "429", "500"]
    download(server.remote(), tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")


@pytest.mark.parametrize(("code", "requests"), [("404", 1), ("403", 1), ("503", stage.TRIES)])
def test_a_refusal_names_address_and_remedy(server, tmp_path, code, requests):
    server.answers = [code] * 20
    with pytest.raises(LpovodError, match=f"file.zip .* answers {code}.* by hand") as error:
        download(server.remote(), tmp_path / "file", pause=0)
    assert str(tmp_path / "file") in str(error.value)
    assert len(server.asked) == requests


def test_no_server_at_all(tmp_path):
    with pytest.raises(LpovodError, match="127.0.0.1:9/x.* refused.* by hand"):
        download(Remote("http://127.0.0.1:9/x", "0" * 40), tmp_path / "file", pause=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(OTHER, "has the sha256"), (CONTENT[:9], "has 9 bytes, the published file 256000")],
)
def test_wrong_bytes_are_refused_and_removed(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(LpovodError, match=f"{message}.*It was removed.*by hand.*{tmp_path}/file"):
        download(server.remote(), tmp_path / "file", pause=0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_there_by_hand_is_checked_and_used(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    download(server.remote(), tmp_path / "file")
    assert server.asked == []
    (tmp_path / "file").write_bytes(OTHER)
    with pytest.raises(LpovodError, match="has the sha256.*Remove"):
        download(server.remote(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == OTHER


def make_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_an_interrupted_extraction_goes_on(tmp_path):
    archive = make_zip(tmp_path / "a.zip", **{"val/1.jpg": b"one", "val/2.jpg": b"two"})
    (tmp_path / "val").mkdir()
    (tmp_path / "val/1.jpg").write_bytes(b"ONE")  # of the same size: it stays
    (tmp_path / "val/2.jpg").write_bytes(b"t")  # a rest
    extract(archive, tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "val").iterdir()} == {
        "1.jpg": b"ONE",
        "2.jpg": b"two",
    }


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "val/../../out.jpg", "..\\out.jpg"])
def test_no_member_leaves_the_folder(tmp_path, name):
    archive = make_zip(tmp_path / "a.zip", **{"val/1.jpg": b"one", name: b"two"})
    with pytest.raises(LpovodError, match="outside its folder"):
        extract(archive, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_no_member_is_a_link(tmp_path):
    link = zipfile.ZipInfo("val/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(LpovodError, match="outside its folder"):
        extract(tmp_path / "a.zip", tmp_path / "to")


@pytest.mark.parametrize("spoil", ["cut", "flip"])
def test_a_damaged_archive_is_named(tmp_path, spoil):
    archive = make_zip(tmp_path / "a.zip", **{"val/1.jpg": CONTENT})
    content = bytearray(archive.read_bytes())
    if spoil == "cut":
        content = content[:-30]
    else:
        content[1000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(LpovodError, match="a.zip is damaged"):
        extract(archive, tmp_path / "to")
    assert not (tmp_path / "to/val/1.jpg").exists()


def test_an_extraction_names_a_full_disk(tmp_path):
    archive = make_zip(tmp_path / "a.zip", **{"1.jpg": CONTENT})
    (tmp_path / ".1.jpg.partial").symlink_to("/dev/full")
    with pytest.raises(LpovodError, match=DISK_FULL):
        extract(archive, tmp_path)


@pytest.fixture()
def coco(server, tmp_path, monkeypatch) -> Path:
    """COCO's validation images, as small as they get, on the local server."""
    archive = make_zip(tmp_path / "served.zip", **{"val2017/1.jpg": b"one", "val2017/2.jpg": b"2"})
    server.content = archive.read_bytes()
    monkeypatch.setitem(stage.COCO, "val2017.zip", server.remote(server.content))
    return tmp_path / "coco"


def test_coco_is_downloaded_and_extracted(server, coco, tmp_path):
    server.answers = ["cut"]
    download_coco("val2017.zip", coco, tmp_path / "record.json")
    assert sorted(p.name for p in (coco / "val2017").iterdir()) == ["1.jpg", "2.jpg"]
    assert list(coco.iterdir()) == [coco / "val2017"]  # not the archive
    assert read_json(tmp_path / "record.json")["url"] == server.url
    download_coco("val2017.zip", coco, tmp_path / "record.json")
    assert len(server.asked) == 2


def test_an_unfinished_extraction_of_coco_is_not_taken_for_data(server, coco, tmp_path):
    (coco / "val2017").mkdir(parents=True)
    (coco / ".val2017.zip.unfinished").touch()
    download_coco("val2017.zip", coco, tmp_path / "record.json")
    assert len(list((coco / "val2017").iterdir())) == 2


def test_data_on_disk_is_used_in_place(server, tmp_path):
    (tmp_path / "val2017").mkdir()
    download_coco("val2017.zip", tmp_path, tmp_path / "record.json")
    assert server.asked == []


def test_a_full_disk_is_noticed_before_the_first_byte(server, tmp_path):
    class Endless(bytes):
        def __len__(self):
            return 10**18

    server.content = Endless()
    with pytest.raises(LpovodError, match="disk has no room"):
        download(server.remote(b""), tmp_path / "file", pause=0)


def test_a_disk_that_fills_up_is_named(server, tmp_path):
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(LpovodError, match=DISK_FULL):
        download(server.remote(), tmp_path / "file", pause=0)


# Files whose size and digest nobody publishes


@pytest.fixture()
def soco(server, monkeypatch) -> str:
    """A file on the local server, in place of one of which the catalogue has an address alone."""
    monkeypatch.setitem(stage.FILES, "soco.pth", Remote(server.url))
    server.content = PICKLE
    return "soco.pth"


def test_the_first_download_is_recorded_and_later_ones_must_equal_it(server, soco, tmp_path):
    records = tmp_path / "records/published.json"
    download_file(tmp_path / "a" / soco, records)
    first = records.read_text()
    assert whole(tmp_path / "a" / soco, PICKLE)
    recorded = json.loads(first)[server.url]
    assert recorded["size"] == len(PICKLE)
    assert recorded["sha256"] == hashlib.sha256(PICKLE).hexdigest()
    assert len(recorded["date"]) == len("2026-11-26")
    download_file(tmp_path / "b" / soco, records)
    server.content = NEWER
    with pytest.raises(LpovodError, match="has the sha256 .*, the published file .*by hand"):
        download_file(tmp_path / "c" / soco, records)
    assert list((tmp_path / "c").iterdir()) == []
    assert records.read_text() == first


def test_a_digest_of_the_configuration_counts_more_than_the_record(server, soco, tmp_path):
    records = tmp_path / "published.json"
    digest = hashlib.sha256(NEWER).hexdigest()
    with pytest.raises(LpovodError, match=f"the published file {digest}"):
        download_file(tmp_path / "a" / soco, records, digest)
    assert not records.exists()
    download_file(tmp_path / "a" / soco, records)
    server.content = NEWER
    download_file(tmp_path / "b" / soco, records, digest)
    assert whole(tmp_path / "b" / soco, NEWER)


@pytest.mark.parametrize("known", [False, True], ids=["no digest", "digest"])
def test_a_page_in_place_of_the_file_is_refused(server, soco, tmp_path, known):
    server.answers = [PAGE]
    digest = hashlib.sha256(PICKLE).hexdigest() if known else None
    with pytest.raises(LpovodError, match="is a web page.*It was removed.*by hand") as error:
        download_file(tmp_path / "a" / soco, tmp_path / "published.json", digest)
    assert f"save it as {tmp_path / 'a' / soco}" in str(error.value)
    assert list((tmp_path / "a").iterdir()) == []
    assert not (tmp_path / "published.json").exists()


def test_without_a_digest_neither_archive_nor_pickle_is_refused(server, soco, tmp_path):
    server.content = b"version https://git-lfs.github.com/spec/v1"
    with pytest.raises(LpovodError, match="starts with b'version '.*It was removed"):
        download_file(tmp_path / soco, tmp_path / "published.json")
    assert list(tmp_path.iterdir()) == []


def test_downloads_that_end_together_are_all_recorded(tmp_path):
    (tmp_path / "file").write_bytes(PICKLE)
    records, remotes = tmp_path / "published.json", [Remote(f"http://x/{n}") for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda remote: remember(remote, tmp_path / "file", records), remotes))
    assert read_json(records).keys() == {remote.url for remote in remotes}


def test_a_download_makes_nothing_stale(server, soco, tmp_path):
    """Before it nobody knows the digest; what was made meanwhile must count as made from it."""
    records, file = tmp_path / "published.json", tmp_path / soco
    before = content_of(file, records)
    download_file(file, records)
    assert content_of(file, records) == before
    file.write_bytes(NEWER)
    assert content_of(file, records) == sha256(file) != before
    (tmp_path / "mine.pth").write_bytes(PICKLE)
    assert content_of(tmp_path / "mine.pth", records) == hashlib.sha256(PICKLE).hexdigest()


# Google Drive, by gdown


@pytest.fixture()
def drive(server, monkeypatch) -> Remote:
    """A file on Google Drive: the requests of gdown's session arrive at the local server."""
    ask = requests.Session.request

    def redirected(session: requests.Session, method: str, url: str, **options) -> object:
        assert url.startswith(DRIVE)
        return ask(session, method, server.url + "?" + url.partition("?")[2], **options)

    monkeypatch.setattr(requests.Session, "request", redirected)
    return Remote(f"{DRIVE}uc?id=1", hashlib.sha256(CONTENT).hexdigest())


def form() -> str:
    """The page that Google shows before a large file: too large to be scanned for viruses."""
    hidden = '<input type="hidden" name="confirm" value="t">'
    return f'<form id="download-form" action="{DRIVE}uc?export=download">{hidden}</form>'


def test_a_file_arrives_from_google_drive_behind_its_page(server, drive, tmp_path):
    server.answers = [form()]
    download(drive, tmp_path / "file")
    assert whole(tmp_path / "file")
    assert len(server.asked) == 2


def test_a_connection_to_google_drive_that_breaks_is_tried_again(server, drive, tmp_path):
    server.answers = ["cut"]
    download(drive, tmp_path / "file", pause=0)
    assert whole(tmp_path / "file")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('<p class="uc-error-subcaption">Too many users have viewed it</p>', "Too many users have"),
        (PAGE, "Cannot retrieve the public link"),
        ("404", "Cannot retrieve the public link"),
    ],
    ids=["quota", "login", "gone"],
)
def test_a_refusal_of_google_drive_names_the_remedy(server, drive, tmp_path, answer, message):
    server.answers = [answer]
    with pytest.raises(LpovodError, match=f"{message}.*by hand.*{tmp_path}/file"):
        download(drive, tmp_path / "file", pause=0)
    assert list(tmp_path.iterdir()) == []
    assert len(server.asked) == 1


def test_google_drive_out_of_reach(server, drive, tmp_path):
    server.url = "http://127.0.0.1:9/x"
    with pytest.raises(LpovodError, match=f"refused.*by hand.*{tmp_path}/file"):
        download(drive, tmp_path / "file", pause=0)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_of_google_drive_is_removed(server, drive, tmp_path):
    server.content = OTHER
    with pytest.raises(LpovodError, match="has the sha256.*It was removed"):
        download(drive, tmp_path / "file", pause=0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_google_drive_s_file_fills_up_is_named(server, drive, tmp_path):
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(LpovodError, match=DISK_FULL):
        download(drive, tmp_path / "file", pause=0)


def test_no_room_for_google_drive_s_file(server, drive, tmp_path, monkeypatch):
    server.content = 10 * CONTENT  # of which gdown reads half a megabyte at once
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(LpovodError, match="disk has no room"):
        download(drive, tmp_path / "file", pause=0)


# A file of an archive


def test_one_file_of_an_archive_in_whichever_folder(tmp_path):
    archive = make_zip(
        tmp_path / "a.zip", **{"proposals/val.pkl": PICKLE, "proposals/train.pkl": b""}
    )
    extract_member(archive, tmp_path / "to" / "val.pkl")
    assert whole(tmp_path / "to" / "val.pkl", PICKLE)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"val.json": b"{}"}, "has 0 files named val.pkl"),
        ({"a/val.pkl": b"1", "b/val.pkl": b"2"}, "has 2 files named val.pkl"),
        ({"../val.pkl": b"1"}, "outside its folder"),
    ],
)
def test_an_archive_without_the_file(tmp_path, members, message):
    archive = make_zip(tmp_path / "a.zip", **members)
    with pytest.raises(LpovodError, match=message):
        extract_member(archive, tmp_path / "to" / "val.pkl")
    assert not (tmp_path / "to").exists()


def test_a_damaged_file_of_an_archive_leaves_nothing(tmp_path):
    archive = make_zip(tmp_path / "a.zip", **{"val.pkl": PICKLE})
    content = bytearray(archive.read_bytes())
    content[1000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(LpovodError, match="a.zip is damaged"):
        extract_member(archive, tmp_path / "to" / "val.pkl")
    assert list((tmp_path / "to").iterdir()) == []


def test_a_file_of_an_archive_names_a_full_disk(tmp_path):
    archive = make_zip(tmp_path / "a.zip", **{"val.pkl": PICKLE})
    (tmp_path / ".val.pkl.partial").symlink_to("/dev/full")
    with pytest.raises(LpovodError, match=DISK_FULL):
        extract_member(archive, tmp_path / "val.pkl")
    assert list(tmp_path.iterdir()) == [archive]


# The rules


@pytest.mark.slow
def test_the_workflow_downloads_what_is_missing_and_leaves_what_is_there(server, tmp_path):
    folder = copy_project(tmp_path / "project")
    catalogue = folder / "lpovod/catalogue.py"
    released = "https://github.com/VinAIResearch/LP-OVOD/releases/download/v1.0"
    catalogue.write_text(catalogue.read_text().replace(released, server.url))
    names = {"val_coco_proposals.pkl": PICKLE, "val_coco_id_map.json": b"{}"}
    server.content = make_zip(tmp_path / "served.zip", **names).read_bytes()
    checkpoint = folder / "data/lp_ovod/vild_sigmoid_ft.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"mine")
    targets = [f"data/lp_ovod/{name}" for name in names]
    jobs = announced(snakemake(folder, "coco_released.yaml", {}, "-n", *targets))
    assert jobs == {
        "download_data_lp_ovod_proposals_zip": 1,
        "extract_data_lp_ovod_val_coco_proposals_pkl": 1,
        "extract_data_lp_ovod_val_coco_id_map_json": 1,
    }
    snakemake(folder, "coco_released.yaml", {}, "--cores", "1", *targets)
    present = {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()}
    assert present == names | {checkpoint.name: b"mine"}  # and not the archive
    recorded = read_json(folder / "resources/published.json")
    assert list(recorded) == [f"{server.url}/proposals.zip"]
    # What is there now belongs to the user: no rule could overwrite it.
    rules = snakemake(folder, "coco_released.yaml", {}, "--list-rules").split()
    assert [rule for rule in rules if "lp_ovod" in rule] == [
        "download_data_lp_ovod_ovd_coco_text_embedding_pth"
    ]
