"""`lpovod serve`: the API on a tiny run, and a walk through the page in a real browser.

What the page shows is compared with `Model.detect`, what it learns with `learn_class` on a run that
was opened anew.
"""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from conftest import make_clip
from PIL import Image
from starlette.testclient import TestClient
from tiny_run import BASE, IMAGES, NOVEL, make_run

from lpovod.apps.learn import Lesson, Run, learn_class, region_of
from lpovod.apps.serve import serve
from lpovod.apps.serve.app import HEADERS, STATIC, build_app
from lpovod.apps.serve.workshop import NO_RUN, Workshop
from lpovod.config import Config, merge
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.model import ModelFile, read_model
from lpovod.model import Model, load
from lpovod.progress import listening, progress

ADDRESS = "http://127.0.0.1"
PER_IMAGE = 4  # few, so that the limit shapes what is shown
FLOOR = 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    clip = make_clip(folder, seed=0)
    return make_run(folder / "tiny", clip, evaluation={"per_image": PER_IMAGE, "temperature": 0.2})


@pytest.fixture(scope="module")
def client(run):
    with TestClient(build_app(Workshop(run, None, "cpu")), base_url=ADDRESS) as client:
        yield client


@pytest.fixture
def page(client) -> "Page":
    return Page(client)


class Page:
    """What the page's script does, without a browser."""

    def __init__(self, client: TestClient):
        self.client = client
        self.start = client.post("/api/sessions", headers={"x-session": "new"}).json()
        self.key = self.start["session"]

    def send(self, method: str, path: str, **options) -> httpx.Response:
        headers = {"x-session": self.key} | options.pop("headers", {})
        return self.client.request(method, path, headers=headers, **options)

    def ask(self, method: str, path: str, **options) -> dict:
        answer = self.send(method, path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, method: str, path: str, **options) -> str:
        answer = self.send(method, path, **options)
        assert 400 <= answer.status_code < 500
        return answer.json()["error"]

    def open(self, path: Path) -> dict:
        headers = {"x-name": path.name}
        return self.ask("POST", "/api/images", content=path.read_bytes(), headers=headers)

    def study(self, path: str, **content) -> list[dict]:
        """The lines of a lesson: progress, then the state or the error."""
        return [json.loads(line) for line in self.send("POST", path, json=content).iter_lines()]

    def model(self, folder: Path) -> ModelFile:
        path = folder / "saved.safetensors"
        path.write_bytes(self.send("GET", "/api/save/model").content)
        return read_model(path)


def image(run: Path, number: int = 0, split: str = "val") -> Path:
    first = 101 if split == "val" else 1
    return run / f"dataset/images/{split}/{first + number}.png"


def shown(opened: dict, threshold: float, classes: list[str] | None, refined: bool) -> list[tuple]:
    """The rule of page.js: threshold, classes, and the best per_image."""
    rows = opened["refined" if refined else "proposed"]
    names = [opened["names"][place] for place in rows["class"]]
    detected = zip(names, rows["score"], rows["box"], strict=True)
    floor = np.float32(threshold)
    return [d for d in detected if d[1] > floor and (classes is None or d[0] in classes)][
        :PER_IMAGE
    ]


def same(found: list[tuple], model: Model, path: Path, *arguments) -> int:
    threshold, classes, refined = arguments
    expected = model.detect(path, threshold, classes, refined=refined)
    assert [name for name, *_ in found] == expected.class_name
    # Another process adds in another order, and features are rounded to half precision.
    np.testing.assert_allclose([s for _, s, _ in found], expected.confidence, atol=1e-4)
    boxes = np.array([box for *_, box in found]).reshape(-1, 4)
    np.testing.assert_allclose(boxes, expected.xyxy, atol=0.0051)
    return len(expected)


@pytest.mark.parametrize("refined", [True, False])
@pytest.mark.parametrize("classes", [None, ["cat"], ["bus", "fish"], ["fish", "dog", "cat"]])
def test_the_page_shows_what_detect_gives_at_any_threshold(run, page, classes, refined):
    model, counts = load(run / "model/model.safetensors", "cpu"), []
    for number in range(3):
        opened = page.open(image(run, number))
        for threshold in (FLOOR, 0.1, 0.3, 0.6, 0.98):
            arguments = threshold, classes, refined
            found = shown(opened, *arguments)
            counts.append(same(found, model, image(run, number), *arguments))
    assert max(counts) > 1 and min(counts) < max(counts) <= PER_IMAGE


def test_saved_detections_are_those_of_the_command_line(run, page, tmp_path):
    page.open(image(run, 0))
    page.open(image(run, 4))
    content = {"threshold": 0.2, "refined": True, "classes": ["cat", "fish"]}
    saved = page.ask("POST", "/api/save/detections", json=content)
    command = [sys.executable, "-m", "lpovod.apps.main", "detect", str(image(run, 0))]
    command += [str(image(run, 4)), "--run", str(run), "--threshold", "0.2", "--device", "cpu"]
    command += ["--classes", "cat", "fish", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    expected = json.loads((tmp_path / "detections.json").read_text())
    assert len(saved) == len(expected) > 0
    for one, other in zip(saved, expected, strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k not in ("bbox", "score")} == {
            k: v for k, v in other.items() if k not in ("bbox", "score")
        }
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.01)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_class_shows_what_it_retrieved_best_first(run, page):
    regions = page.ask("GET", "/api/regions?name=bus")["regions"]
    opened = Run(run)
    expected = opened.retrieve(opened.model)["bus"].regions
    assert [region_of(r["region"]) for r in regions] == [r["key"] for r in expected]
    assert [r["cosine"] for r in regions] == sorted((r["cosine"] for r in expected), reverse=True)
    assert [r["objectness"] for r in regions] == [r["score"] for r in expected]
    assert not any(r["dropped"] for r in regions)
    crop = Image.open(
        io.BytesIO(page.send("GET", f"/api/crops/{regions[0]['region']}.jpg").content)
    )
    assert crop.format == "JPEG" and crop.size == (160, 160)


def test_a_correction_gives_the_model_of_a_run_opened_anew(run, page, tmp_path):
    path = image(run, 1)
    before = page.open(path)
    regions = [r["region"] for r in page.ask("GET", "/api/regions?name=bus")["regions"]]
    drop = [regions[0], regions[3]]
    lines = page.study("/api/correct", name="bus", drop=drop)
    assert {line["step"] for line in lines[:-1]} >= {"retrieving regions", "linear probe"}
    assert lines[-2]["done"] == lines[-2]["total"] > 0
    assert (lines[-1]["undo"], lines[-1]["redo"]) == ("correct bus", None)
    fresh = Run(run)
    keys = tuple(sorted(region_of(text) for text in drop))
    expected = learn_class(fresh, fresh.model, Lesson("bus", drop=keys))
    saved = page.model(tmp_path)
    assert saved.classes == expected.classes
    np.testing.assert_array_equal(saved.weights["bus"], expected.weights["bus"])
    for name in (*BASE, "fish"):
        np.testing.assert_array_equal(saved.weights[name], fresh.model.weights[name])
    assert (saved.weights["bus"] != fresh.model.weights["bus"]).any()
    after = page.ask("GET", f"/api/images/{before['image']}")
    model = load(tmp_path / "saved.safetensors", "cpu")
    for arguments in ((0.1, None, True), (FLOOR, ["bus"], True)):
        assert same(shown(after, *arguments), model, path, *arguments)
    marked = page.ask("GET", "/api/regions?name=bus")["regions"]
    assert sorted(r["region"] for r in marked if r["dropped"]) == sorted(drop)
    # A second correction replaces the first one.
    page.study("/api/correct", name="bus", drop=regions[1:2])
    fresh = learn_class(fresh, fresh.model, Lesson("bus", drop=(region_of(regions[1]),)))
    np.testing.assert_array_equal(page.model(tmp_path).weights["bus"], fresh.weights["bus"])


def test_undo_and_redo_change_what_is_detected(run, page):
    opened = page.open(image(run))
    number = opened["image"]
    page.study("/api/learn", name="owl")
    learned = page.ask("GET", f"/api/images/{number}")
    assert "owl" in learned["names"] and "owl" not in opened["names"]
    state = page.ask("POST", "/api/undo")
    assert (state["undo"], state["redo"]) == (None, "learn owl")
    undone = page.ask("GET", f"/api/images/{number}")
    assert undone == {key: opened[key] for key in undone}
    assert page.ask("POST", "/api/redo")["undo"] == "learn owl"
    assert page.ask("GET", f"/api/images/{number}") == learned
    assert page.refused("POST", "/api/redo") == "there is nothing to redo"


def test_a_class_is_learned_from_its_name_a_prompt_and_pictures(run, page, tmp_path):
    pictures = [image(run, number, "train") for number in (2, 5)]
    keys = [
        page.ask("POST", "/api/pictures", content=path.read_bytes())["picture"] for path in pictures
    ]
    page.study("/api/learn", name=" an owl ", prompt="a snowy owl", pictures=keys)
    fresh = Run(run)
    vectors = tuple(fresh.embed_picture(path) for path in pictures)
    lesson = Lesson("an owl", "a snowy owl", vectors, tuple(keys))
    expected = learn_class(fresh, fresh.model, lesson)
    saved = page.model(tmp_path)
    assert saved.classes == expected.classes and saved.classes[-1].name == "an owl"
    for part in ("weights", "text", "queries"):
        np.testing.assert_array_equal(
            getattr(saved, part)["an owl"], getattr(expected, part)["an owl"]
        )
    # A correction keeps prompt and pictures.
    worst = page.ask("GET", "/api/regions?name=an owl")["regions"][-1]["region"]
    page.study("/api/correct", name="an owl", drop=[worst])
    expected = learn_class(fresh, fresh.model, replace(lesson, drop=(region_of(worst),)))
    saved = page.model(tmp_path)
    assert saved.classes == expected.classes
    np.testing.assert_array_equal(saved.weights["an owl"], expected.weights["an owl"])


def test_a_word_without_a_probe_is_scored_by_the_clip_head_until_it_is_learned(run, page):
    opened = page.open(image(run, 2))
    state = page.ask("POST", "/api/words", json={"words": ["a kite", "bus"]})
    assert [c["name"] for c in state["classes"] if c["split"] == "word"] == ["a kite"]
    found = page.ask("GET", f"/api/images/{opened['image']}")
    model = load(run / "model/model.safetensors", "cpu")
    for classes in (["a kite"], ["a kite", "cat", "dog", *NOVEL]):
        arguments = FLOOR, classes, True
        assert same(shown(found, *arguments), model, image(run, 2), *arguments)
    assert "no linear probe" in page.refused("GET", "/api/regions?name=a kite")
    learned = page.study("/api/learn", name="a kite")[-1]
    assert [c["split"] for c in learned["classes"] if c["name"] == "a kite"] == ["novel"]
    page.ask("POST", "/api/undo")
    state = page.ask("POST", "/api/words", json={"words": []})
    assert [c["name"] for c in state["classes"]] == [*BASE, *NOVEL]


def test_the_overlay_adds_the_classes_and_names_the_corrections(run, page):
    page.study("/api/learn", name="an owl: #1", prompt="snow: owl")
    region = page.ask("GET", "/api/regions?name=fish")["regions"][2]["region"]
    page.study("/api/correct", name="fish", drop=[region])
    text = page.send("GET", "/api/save/overlay").text
    content = read_model(run / "model/model.safetensors").config.model_dump(mode="json")
    config = Config.model_validate(merge(content, yaml.safe_load(text)))
    assert config.classes.novel == [*NOVEL, "an owl: #1"]
    assert config.classes.prompts == {"an owl: #1": "snow: owl"}
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("fish" in line and region in line for line in comments)


def test_pages_do_not_see_each_other(run, client):
    one, other = Page(client), Page(client)
    number = one.open(image(run))["image"]
    one.study("/api/learn", name="owl")
    one.ask("POST", "/api/words", json={"words": ["kite"]})
    assert [c["name"] for c in other.ask("GET", "/api/state")["classes"]] == [*BASE, *NOVEL]
    assert "only the last" in other.refused("GET", f"/api/images/{number}")
    assert "only the last" in other.refused("GET", f"/api/images/{number}.jpg")
    assert other.open(image(run))["names"] == [*BASE, *NOVEL]
    assert other.ask("GET", "/api/state")["undo"] is None
    assert client.get(f"/api/images/{number}.jpg?session=guessed").status_code == 410


def test_many_pages_and_images_are_bounded_and_a_lost_page_says_so(run, client):
    lost = Page(client)
    pages = [Page(client) for _ in range(16)]
    assert "Reload the page" in lost.refused("GET", "/api/state")
    numbers = [pages[-1].open(image(run, n))["image"] for n in range(9)]
    assert "only the last 8 images" in pages[-1].refused("GET", f"/api/images/{numbers[0]}")
    assert pages[-1].ask("GET", f"/api/images/{numbers[1]}")["image"] == numbers[1]


def test_fifty_uploads_at_once_are_all_answered(run):
    app = build_app(Workshop(run, None, "cpu"))
    content = [image(run, number % IMAGES).read_bytes() for number in range(50)]

    async def upload() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            start = await client.post("/api/sessions", headers={"x-session": "new"})
            headers = {"x-session": start.json()["session"]}
            sent = [client.post("/api/images", content=c, headers=headers) for c in content]
            return await asyncio.gather(*sent)

    answers = asyncio.run(upload())
    assert [answer.status_code for answer in answers] == [200] * 50
    assert sorted(answer.json()["image"] for answer in answers) == list(range(1, 51))


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def noise() -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "x.png is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.png is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.png is not an image"),
        (noise()[:6000], "x.png cannot be decoded"),
        (png(10_000, 10_000), "x.png is 10000 x 10000 pixels; at most 50 million"),
        (png(20_000, 20_000), "x.png has far more than 50 million pixels"),
        (bytes((32 << 20) + 1), "x.png is larger than 32 MB"),
    ],
    ids=["empty", "svg", "postscript", "cut", "100 megapixels", "bomb", "33 MB"],
)
def test_a_bad_image_is_named_and_the_server_lives(run, page, content, words):
    for path in ("/api/images", "/api/pictures"):
        headers = {"x-name": "..%2F..%2Fetc%2Fx.png"}
        message = page.refused("POST", path, content=content, headers=headers)
        assert words in message and "tmp" not in message and ".." not in message
    assert page.open(image(run))["width"]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/api/learn", {"name": " "}, "the name of the class is empty"),
        ("/api/learn", {"name": "x" * 101}, "has 101 letters; at most 100"),
        ("/api/learn", {"name": "a\nb"}, "cannot be printed"),
        ("/api/learn", {"name": "dog"}, "is a base class"),
        ("/api/learn", {"name": "Bus"}, "differs in form only"),
        ("/api/learn", {"name": "owl", "pictures": ["0" * 64]}, "Add them again"),
        ("/api/learn", {"name": "owl", "by_name": False}, "needs pictures"),
        ("/api/correct", {"name": "dog", "drop": []}, "no novel class"),
        ("/api/correct", {"name": "bus", "drop": ["../x"]}, "expected image:place"),
        ("/api/correct", {"name": "bus", "drop": ["9:9"]}, "no such training region"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_words(page, path, content, words):
    assert words in page.study(path, **content)[-1]["error"]
    assert page.ask("GET", "/api/state")["undo"] is None


def test_a_class_that_loses_all_its_regions_is_refused(page):
    regions = [r["region"] for r in page.ask("GET", "/api/regions?name=bus")["regions"]]
    last = page.study("/api/correct", name="bus", drop=regions)[-1]
    assert "no region is left" in last["error"]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/api/words", b"[1", "not a json object"),
        ("/api/words", b'{"words": [1]}', "expected a list of texts"),
        ("/api/words", json.dumps({"words": [f"w{n}" for n in range(51)]}).encode(), "at most 50"),
        ("/api/save/detections", b'{"threshold": 2}', "from 0 to 1"),
        ("/api/save/detections", b'{"threshold": 0.5, "classes": ["x"]}', "no class 'x'"),
        ("/api/examples/1", b"", "no such example"),
    ],
)
def test_a_wrong_request_is_refused_in_words(page, path, content, words):
    assert words in page.refused("POST", path, content=content)


def test_nothing_outside_the_page_s_folder_is_read(client):
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/app.py"):
        assert client.get(path).status_code == 404
    assert client.get("/api/crops/..%2f..%2fx.jpg").status_code in (400, 404)


def test_other_sites_are_refused(client):
    assert client.post("/api/sessions").status_code == 400  # their requests have no such header
    answer = client.get("/", headers={"host": "evil.example"})
    assert answer.status_code == 400
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200


def test_the_page_names_no_other_address(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy == HEADERS["content-security-policy"] and "default-src 'none'" in policy
    for path in STATIC.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"')]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
        assert path.name == "index.html" or client.get(f"/static/{path.name}").status_code == 200


def test_examples_are_validation_images(run, page):
    assert 0 < len(page.start["examples"]) <= 8
    number = page.start["examples"][0]
    thumbnail = page.client.get(f"/api/examples/{number}.jpg").content
    assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
    opened = page.ask("POST", f"/api/examples/{number}")
    assert opened["name"] == f"{number}.png"
    model = load(run / "model/model.safetensors", "cpu")
    path = run / f"dataset/images/val/{number}.png"
    assert same(shown(opened, 0.1, None, True), model, path, 0.1, None, True)


def test_a_model_alone_detects_and_says_why_it_cannot_learn(run, tmp_path):
    app = build_app(Workshop(None, run / "model/model.safetensors", "cpu"))
    page = Page(TestClient(app, base_url=ADDRESS))
    assert page.start["refusal"] == NO_RUN and page.start["examples"] == []
    assert page.open(image(run))["names"] == [*BASE, *NOVEL]
    assert page.study("/api/learn", name="owl") == [
        {"step": "retrieving regions", "done": 0, "total": None},
        {"error": NO_RUN},
    ]
    assert page.refused("GET", "/api/regions?name=bus") == NO_RUN


def test_a_saved_model_can_be_opened_again_with_its_run(run, page, tmp_path):
    page.study("/api/learn", name="owl")
    page.model(tmp_path)
    again = build_app(Workshop(run, tmp_path / "saved.safetensors", "cpu"))
    page = Page(TestClient(again, base_url=ADDRESS))
    regions = page.ask("GET", "/api/regions?name=owl")["regions"]
    lines = page.study("/api/correct", name="owl", drop=[regions[0]["region"]])
    assert lines[-1]["undo"] == "correct owl"


def test_a_model_of_another_run_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other", make_clip(tmp_path, seed=1))
    with pytest.raises(LpovodError, match="comes from another run"):
        Workshop(run, other / "model/model.safetensors", "cpu")


def test_wrong_arguments_end_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="give a finished run"):
        serve()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LpovodError, match=f"port {port}"):
            serve(run=tmp_path, port=port)


def test_a_listener_hears_of_the_bars_of_its_thread(capsys):
    heard = []
    with listening(lambda *line: heard.append(line)):
        for _ in progress(range(3), "things", "thing"):
            pass
    assert heard[0] == ("things", 0, 3) and heard[-1] == ("things", 3, 3)
    assert capsys.readouterr().err == ""
    for _ in progress(range(3), "things", "thing"):
        pass
    assert len(heard) < 6


# --- in a browser


@pytest.fixture
def address(run):
    """The server as a person starts it."""
    command = [sys.executable, "-m", "lpovod.apps.main", "serve", "--run", str(run)]
    command += ["--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().split()[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT


@pytest.fixture
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def frames(tab) -> list[tuple[str, float, list[float]]]:
    """The drawn detections, best first."""
    drawn = tab.eval_on_selector_all(
        "#boxes .frame", "all => all.map(g => [g.dataset.name, g.dataset.score, g.dataset.box])"
    )
    return [
        (name, float(score), [float(side) for side in box.split()])
        for name, score, box in reversed(drawn)
    ]


def idle(tab) -> None:
    tab.wait_for_selector("body[data-ready]:not([aria-busy])")
    assert tab.is_hidden("#alert"), tab.text_content("#alert")


@pytest.mark.slow
def test_a_walk_through_the_page(run, address, browser, tmp_path):
    tab = browser.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    outside: list[str] = []
    tab.on(
        "request",
        lambda r: (
            None if r.url.startswith((address, "blob:", "data:")) else (outside.append(r.url))
        ),
    )
    tab.goto(address)
    idle(tab)
    assert tab.is_visible("text=Drop an image here")

    # An image, and boxes that follow threshold, classes and refinement without the server.
    path, model = image(run, 3), load(run / "model/model.safetensors", "cpu")
    tab.set_input_files("#files", path)
    tab.wait_for_selector("#boxes .frame", state="attached")
    idle(tab)
    assert same(frames(tab), model, path, 0.3, None, True)
    requests: list[str] = []
    tab.on("request", lambda r: requests.append(r.url))
    for threshold in (0.05, 0.6):
        tab.fill("#threshold", str(threshold))
        same(frames(tab), model, path, threshold, None, True)
    tab.fill("#threshold", "0.1")
    tab.uncheck("#refined")
    assert same(frames(tab), model, path, 0.1, None, False)
    tab.check("#refined")
    tab.uncheck("#classes li[data-name=cat] input")
    assert same(frames(tab), model, path, 0.1, ["dog", *NOVEL], True)
    tab.fill("#only", "fish, bus")
    tab.press("#only", "Enter")
    same(frames(tab), model, path, 0.1, ["fish", "bus"], True)
    tab.click("#all")
    assert requests == []

    # Why a bus? Two regions are wrong, by mouse and by keyboard.
    tab.click("#classes .name:text-is('bus')")
    tab.wait_for_selector(".region")
    idle(tab)
    assert tab.is_disabled("#correct")
    tab.click(".region >> nth=1")
    tab.focus(".region >> nth=4")
    tab.keyboard.press("Space")
    wrong = tab.eval_on_selector_all(
        ".region[aria-pressed=true]", "all => all.map(b => b.dataset.region)"
    )
    assert len(wrong) == 2
    before = frames(tab)
    tab.click("#correct")
    tab.wait_for_selector("#undo:not(:disabled)")
    idle(tab)
    fresh = Run(run)
    keys = tuple(sorted(region_of(text) for text in wrong))
    corrected = model.with_content(learn_class(fresh, fresh.model, Lesson("bus", drop=keys)))
    same(frames(tab), corrected, path, 0.1, None, True)
    tab.click("#undo")
    tab.wait_for_selector("#redo:not(:disabled)")
    idle(tab)
    assert frames(tab) == before
    tab.click("#redo")
    tab.wait_for_selector("#undo:not(:disabled)")
    idle(tab)
    same(frames(tab), corrected, path, 0.1, None, True)

    # A new class; then the saved files, used on the command line.
    tab.fill("#name", "owl")
    tab.click("#new button[type=submit]")
    tab.wait_for_selector("#classes li[data-name=owl]")
    idle(tab)
    assert tab.text_content("#why-title") == "Why owl?"
    tab.click("#save summary")
    with tab.expect_download() as download:
        tab.click("#save-model")
    saved = tmp_path / "mine.safetensors"
    download.value.save_as(saved)
    tab.click("#save summary")
    with tab.expect_download() as download:
        tab.click("#save-detections")
    download.value.save_as(tmp_path / "page.json")
    command = [sys.executable, "-m", "lpovod.apps.main", "detect", str(path), "--threshold", "0.1"]
    command += ["--model", str(saved), "--output", str(tmp_path), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    detected = json.loads((tmp_path / "detections.json").read_text())
    downloaded = json.loads((tmp_path / "page.json").read_text())
    drawn = frames(tab)
    assert len(detected) == len(downloaded) == len(drawn) > 0
    for entry, page_entry, (name, score, box) in zip(detected, downloaded, drawn, strict=True):
        assert entry["class_name"] == page_entry["class_name"] == name
        assert entry["score"] == pytest.approx(score, abs=1e-4)
        x, y, width, height = entry["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], box, atol=0.05)

    # Errors are words on the page.
    (tmp_path / "notes.png").write_text("no image")
    tab.set_input_files("#files", tmp_path / "notes.png")
    tab.wait_for_selector("#alert:not([hidden])")
    assert "notes.png is not an image" in tab.text_content("#alert")
    assert outside == []
    assert [p for p in problems if "400" not in p] == []
    tab.set_viewport_size({"width": 360, "height": 700})
    # The image is fitted anew when the browser tells the page of its width.
    tab.wait_for_function("document.documentElement.scrollWidth <= 360")
