"""The demo page as people use it: a real server in a process of its own, a real browser without a window."""

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint
from pipelines.two_stage import Pipeline
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
SECONDS = 150  # until something must have happened, on a busy machine
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(4 * SECONDS),
]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1280,1400"]  # fmt: skip
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxies the environment names
MASK_COLOUR = [255, 32, 96]
HUES = ("red", "green", "blue")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """The script, running."""

    def __init__(self, folder: Path, pipeline: Pipeline, *options: str):
        pipeline.save_pretrained(folder / "run")
        self.port, self.temporary = free_port(), folder / "temporary"
        self.temporary.mkdir()
        command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--run", str(folder / "run")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary),
                       "http_proxy": "http://192.0.2.1:9", "HTTP_PROXY": "http://192.0.2.1:9"}  # fmt: skip
        self.address, self.log = f"http://127.0.0.1:{self.port}/", folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options], env=environment, stdout=log, stderr=log
            )
        try:
            wait_for(lambda: self.address in self.said() or self.process.poll() is not None, "the server")
            assert self.process.poll() is None, self.said()
        except BaseException:
            self.end()
            raise

    def said(self) -> str:
        return self.log.read_text()

    def get(self, path: str, body: bytes | None = None, **headers: str) -> int:
        """The status with which a request is answered; with a body it is one to post it."""
        request = urllib.request.Request(self.address + path, data=body, headers=headers)
        try:
            return OPENER.open(request, timeout=SECONDS).status
        except urllib.error.HTTPError as error:
            return error.code

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(SECONDS)


def wait_for(condition, what: str, seconds: float = SECONDS):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


@torch.no_grad()
def tell_apart(tokenizer, codes) -> None:
    """Spreads a random encoder's features of decoded codes over its codebook, or it gives one code to all images."""
    features = tokenizer.to_quantizer(tokenizer.encoder(2 * tokenizer.decode(codes) - 1))
    scale = tokenizer.quantizer.codebook.std() / features.std(dim=(0, 2, 3))
    tokenizer.to_quantizer.weight.mul_(scale.view(-1, 1, 1, 1))
    tokenizer.to_quantizer.bias.sub_(features.mean(dim=(0, 2, 3))).mul_(scale)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of a random class-conditional pipeline with 32 x 32 codes, so that there is something to watch."""
    torch.manual_seed(0)
    preprocessing = {"image_size": [128, 128], "channels": 3, "resize_filter": "bicubic", "crop": "center",
                     "binarize": "none"}  # fmt: skip
    fields = {**tiny.TOKENIZERS["vqvae"], "image_shape": (3, 128, 128), "preprocessing": preprocessing}
    tokenizer = build_tokenizer({"type": "vqvae", **fields})
    with torch.no_grad():
        tokenizer.quantizer.codebook.mul_(20)  # else all codes are decoded to much the same grey
    tell_apart(tokenizer, tokenizer.prior.sample(4))
    implied = {"spec": tokenizer.spec, "num_classes": 3, "tokenizer_fingerprint": fingerprint(tokenizer)}
    prior = build_prior({"type": "gpt", **tiny.PRIORS["gpt"], **implied})
    running = Server(
        tmp_path_factory.mktemp("demo"), Pipeline(tokenizer, prior, class_names=HUES), "--max_upload_bytes", "200000",
        "--max_pixels", "10000",
    )  # fmt: skip
    yield running
    running.end()


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = Chrome(options=options, service=Service(DRIVER))
        driver.set_page_load_timeout(SECONDS)
        yield driver
        driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, just opened; what the browser asked for and complained about is looked at afterwards."""
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(server.address)
    # Gradio lays a veil over what it waits for, whose colour `middle` would take for that of the canvas
    browser.execute_script("""
        document.head.append(Object.assign(document.createElement("style"), {
            textContent: "[data-testid=status-tracker] {visibility: hidden !important}"
        }));
    """)
    opened = Page(browser)
    opened.wait("#drawing canvas")
    opened.wait_for_middle("#drawing", lambda colour: colour == [0, 0, 0])
    yield opened
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert complaints == opened.expected_complaints
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(server.address) for url in asked)
    foreign = [url for url in asked if not url.startswith((server.address, f"blob:{server.address}", "data:"))]
    assert foreign == []
    assert "Traceback" not in server.said()


class Page:
    """Hands and eyes."""

    def __init__(self, driver):
        self.driver, self.expected_complaints = driver, []

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def wait(self, selector: str):
        return wait_for(lambda: [one for one in self.all(selector) if one.is_displayed()], selector)[0]

    def text(self, selector: str) -> str:
        return self.driver.execute_script(
            "const found = document.querySelector(arguments[0]); return found ? found.innerText : ''", selector
        )

    def click(self, selector: str) -> None:
        one = self.wait(selector)
        wait_for(one.is_enabled, f"{selector} to be enabled")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
        one.click()

    def open_tab(self, name: str) -> None:
        self.click(f"button[role=tab][data-tab-id={name}]")

    def source(self, selector: str) -> str:
        def found():
            return [one.get_attribute("src") for one in self.all(f"{selector} img")]

        return wait_for(found, f"the picture {selector}")[0]

    def picture(self, selector: str) -> np.ndarray:
        """(height, width, 3): an image as the page got it."""
        with OPENER.open(self.source(selector), timeout=SECONDS) as answer, Image.open(answer) as picture:
            return np.asarray(picture.convert("RGB"))

    def new_picture(self, selector: str, before: str) -> np.ndarray:
        wait_for(lambda: self.source(selector) != before, f"a new picture {selector}")
        return self.picture(selector)

    def paint(self, selector: str, *steps: tuple[int, int]) -> None:
        """A stroke on a canvas from steps[0], relative to its middle, on by the others."""
        from selenium.webdriver import ActionChains

        canvas = self.wait(f"{selector} canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        stroke = ActionChains(self.driver).move_to_element_with_offset(canvas, *steps[0]).click_and_hold()
        for step in steps[1:]:
            stroke = stroke.move_by_offset(*step)
        stroke.release().perform()

    def middle(self, selector: str) -> list[int]:
        """The colour in the middle of a canvas."""
        shot = Image.open(io.BytesIO(self.wait(f"{selector} canvas").screenshot_as_png)).convert("RGB")
        return list(shot.getpixel((shot.width // 2, shot.height // 2)))

    def wait_for_middle(self, selector: str, condition) -> None:
        wait_for(lambda: condition(self.middle(selector)), f"the middle of {selector} to change")

    def upload(self, selector: str, path: Path) -> None:
        field = self.driver.execute_script(
            """for (let around = document.querySelector(arguments[0]); around; around = around.parentElement) {
                const fields = around.querySelectorAll("input[type=file]");
                if (fields.length) return fields[0];
            }""", selector
        )  # fmt: skip
        field.send_keys(str(path))

    def toast(self, containing: str) -> str:
        def found():
            texts = [one.text for one in self.all(".toast-body, .toast-wrap")]
            return next((text for text in texts if containing in text), "")

        return wait_for(found, f"the message '{containing}'")


def test_what_is_drawn_is_reconstructed_with_its_codes(page):
    before = page.source("#reconstruction")
    page.paint("#drawing", (-60, -60), (120, 120))
    drawn = page.new_picture("#reconstruction", before)
    seen = drawn[:, : drawn.shape[1] // 2]
    assert (seen > 200).all(axis=2).mean() > 0.02  # white strokes on black
    assert page.picture("#codes-0").shape[:2] == (448, 448)
    assert "PSNR" in page.text("#psnr")


def test_images_arrive_code_by_code_and_can_be_sent_to_other_tabs(page):
    from selenium.webdriver import ActionChains

    page.open_tab("sample")
    page.wait("#sample")
    # In the page itself: asked from outside, a busy machine would answer too late
    page.driver.execute_script("""
        window.seen = new Set();
        setInterval(() => {
            const image = document.querySelector("#samples img"), status = document.querySelector("#status");
            if (image && status) window.seen.add(status.innerText.split(" codes")[0] + " " + image.src);
        }, 10)
    """)
    page.click("#sample")
    wait_for(lambda: "1024 of 1024 codes" in page.text("#status"), "all codes")
    seen = page.driver.execute_script("return [...window.seen]")
    assert len({entry.split()[-1] for entry in seen}) > 1
    assert any(0 < int(entry.split()[0]) < 1024 for entry in seen)
    picture = page.picture("#samples")
    assert picture.shape[0] == picture.shape[1]  # 16 images, 4 by 4
    click = ActionChains(page.driver).move_to_element_with_offset(page.wait("#samples img"), -60, -60).click()
    click.perform()
    page.click("#send-to-hole")
    page.wait_for_middle("#hole", lambda colour: colour != [0, 0, 0])


def test_the_same_seed_draws_the_same_images_whose_file_is_not_written_again(page):
    """A file that is written while a browser reads it arrives broken."""
    page.open_tab("sample")
    page.click("#sample")
    wait_for(lambda: "1024 of 1024 codes" in page.text("#status"), "all codes")
    source = page.source("#samples")
    loaded = "const image = document.querySelector('#samples img'); return image.complete && image.naturalWidth > 0"
    wait_for(lambda: page.driver.execute_script(loaded), "the picture to be read")
    path = Path(source.partition("file=")[2])
    Image.new("RGB", (8, 8), "red").save(path.with_name("red.png"))
    path.with_name("red.png").replace(path)
    page.click("#sample")
    wait_for(lambda: not page.text("#status").startswith("1024"), "another drawing")
    wait_for(lambda: "1024 of 1024 codes" in page.text("#status"), "all codes again")
    wait_for(lambda: page.source("#samples") == source, "the same images")
    assert page.picture("#samples")[0, 0].tolist() == [255, 0, 0]


def test_drawing_is_stopped(page):
    page.open_tab("sample")
    page.wait("#sample")
    page.driver.execute_script("""
        const waiting = setInterval(() => {
            const button = document.querySelector("#stop");
            if (!button.disabled) { button.click(); clearInterval(waiting); }
        }, 10)
    """)
    page.click("#sample")
    wait_for(lambda: page.text("#status").startswith("Stopped: "), "the end")
    assert "1024 of 1024" not in page.text("#status")
    page.click("#sample")
    wait_for(lambda: "1024 of 1024 codes" in page.text("#status"), "another drawing")


def test_what_is_painted_over_is_completed(page):
    page.open_tab("complete")
    page.wait_for_middle("#hole", lambda colour: colour == [0, 0, 0])
    page.click("#complete")
    page.toast("nothing is painted")
    page.click("#hole-sample")
    page.wait_for_middle("#hole", lambda colour: colour != [0, 0, 0])
    page.paint("#hole", (-60, 0), (120, 0))
    page.wait_for_middle("#hole", lambda colour: colour == MASK_COLOUR)
    page.click("#complete")
    wait_for(lambda: len(page.all("#completions img")) == 8, "8 completions")
    hidden = page.picture("#hidden")
    share = (hidden[:, hidden.shape[1] // 2 :] == 127).all(axis=2).mean()
    assert 0.05 < share < 0.6


def test_codes_are_swapped(page):
    page.open_tab("swap")
    page.wait_for_middle("#first", lambda colour: colour == [0, 0, 0])
    page.click("#first-sample")
    page.wait_for_middle("#first", lambda colour: colour != [0, 0, 0])
    before = page.source("#second")
    page.click("#second-sample")
    page.new_picture("#second", before)
    page.click("#swap")
    first, mixed, second = np.array_split(page.picture("#swapped")[:, :-2], 3, axis=1)  # without the last frame
    half = len(first) // 2
    assert not np.array_equal(first, second)
    assert np.array_equal(mixed[: half - 40], second[: half - 40])  # but where the decoder sees both
    assert np.array_equal(mixed[half + 40 :], first[half + 40 :])
    assert page.picture("#swapped-codes-0").shape[:2] == (448, 448)


def test_an_uploaded_picture_is_seen(page, tmp_path):
    Image.new("RGB", (90, 90), (200, 40, 40)).save(tmp_path / "red.png")
    before = page.source("#reconstruction")
    page.upload("#drawing-upload", tmp_path / "red.png")
    picture = page.new_picture("#reconstruction", before)
    assert picture[40, 40].tolist() == pytest.approx([200, 40, 40], abs=1)


def test_what_is_no_picture_or_too_large_is_refused_in_the_page(page, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    page.upload("#drawing-upload", tmp_path / "notes.txt")
    page.toast("notes.txt")
    (tmp_path / "text.png").write_text("hello")
    page.upload("#drawing-upload", tmp_path / "text.png")
    page.toast("text.png is not an image that can be read")
    Image.new("L", (200, 200)).save(tmp_path / "many.png")
    page.upload("#drawing-upload", tmp_path / "many.png")
    page.toast("many.png has 200 x 200 = 40,000 pixels; the limit is 10,000")
    (tmp_path / "heavy.png").write_bytes(bytes(200_001))
    page.upload("#drawing-upload", tmp_path / "heavy.png")
    page.toast("heavy.png")
    assert "exceed" in page.toast("maximum allowed size")


def test_the_page_is_for_this_machine_alone(server):
    assert f"the demo is at {server.address}" in server.said()
    assert server.get("") == 200
    assert server.get("", Host=f"localhost:{server.port}") == 200
    assert server.get("", Host="example.org") == 400
    for file in (ROOT / "README.md", Path("/etc/passwd"), server.temporary.parent / "log"):
        assert server.get(f"gradio_api/file={file}") in (403, 404)
    assert server.get("gradio_api/file=http://192.0.2.1/picture.png") >= 400
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}/picture.png"
        assert server.get(f"gradio_api/file={address}") >= 400


@pytest.mark.parametrize(("size", "status"), [(199_000, 200), (200_001, 413)])
def test_uploads_are_limited_by_the_server_too(server, size, status):
    border = "7f3a"
    body = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body += bytes(size) + f"\r\n--{border}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    assert server.get("gradio_api/upload", body, **headers) == status


def test_nothing_is_left_behind(tmp_path):
    tokenizer = build_tokenizer({"type": "vqvae", **tiny.TOKENIZERS["vqvae"]})
    running = Server(tmp_path, Pipeline(tokenizer))
    assert running.get("") == 200
    assert any(running.temporary.glob("tessera-demo-*"))
    assert running.end() == 130
    assert not any(running.temporary.glob("tessera-demo-*"))
