"""The page in a real browser, over a small world of known truth and the real service."""

import base64
import csv
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import straight_frames, write
from head import free_ports
from numpy.typing import NDArray
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Key
from selenium.webdriver.remote.webelement import WebElement

from vsearch.build_index import build_index
from vsearch.config import PRESETS
from vsearch.corpus import Corpus
from vsearch.demo.world import make_world
from vsearch.evaluate import read_queries
from vsearch.ingest import ingest
from vsearch.keys import add_key

pytestmark = pytest.mark.long
PATIENCE_S = 20.0
WIDE, NARROW = (1280, 900), (320, 640)
OLD = "old.mp4"
"""A video whose codec no browser plays."""
BROKEN = "broken.mp4"


# ── an archive, a service, a browser ─────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def archive(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's videos, tagged with a camera each, one in MPEG-2, and one that is broken."""
    folder = tmp_path_factory.mktemp("archive")
    make_world(folder / "more", seed=12, videos=1, scenes_per_video=2)
    (drawn,) = (folder / "more").glob("*.mp4")
    pictures = [frame.to_ndarray(format="rgb24") for frame in straight_frames(drawn)]
    write(folder / OLD, pictures, "mpeg2video")
    (folder / BROKEN).write_bytes(b"this is no video")
    videos = [*sorted(world.glob("*.mp4")), folder / OLD, folder / BROKEN]
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "camera"])
        rows.writerows([str(video), number] for number, video in enumerate(videos))
    return folder


@pytest.fixture(scope="module")
def corpus(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Indexed by CLIP's own vectors: what a short training makes of twelve scenes is no matter here."""
    url = str(tmp_path_factory.mktemp("corpus"))
    ingest(url, [str(archive / "list.csv")], PRESETS["demo"])
    build_index(url, space="clip")
    return Corpus(url)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def api_key(key_file: Path) -> str:
    return add_key(key_file, "browser")


@pytest.fixture(scope="module")
def address(corpus: Corpus, api_key: str, key_file: Path) -> Iterator[str]:
    """The page of a service that asks for a key."""
    from ray import serve

    from vsearch.serve import ServeArgs, start

    (port,) = free_ports(1)
    yield start(ServeArgs(corpus=corpus.url, keys=str(key_file)), port=port)
    serve.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(found):
        reason = "there is no chromium with its chromedriver: .ci/browser installs them"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for argument in (
        "--headless=new",
        "--no-sandbox",  # as root, as in CI, there is none
        "--disable-dev-shm-usage",
        "--mute-audio",
        "--lang=en-GB",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(found[1])))
    driver.set_script_timeout(PATIENCE_S)
    yield driver
    driver.quit()


class Page:
    """What people see and do on the page."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address
        self.keys = ActionChains(driver)

    def open(self, query: str = "") -> None:
        self.driver.get("about:blank")  # else an address that differs by its query only may be kept
        self.driver.get(self.address + query)

    def size(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        try:
            return [element for element in found if element.is_displayed()]
        except StaleElementReferenceException:  # the page was drawn anew meanwhile
            return self.all(selector)

    def the(self, selector: str) -> WebElement:
        """The first such element, as soon as it is shown."""
        return until(lambda: self.all(selector), f"{selector} is not shown")[0]

    def press(self, selector: str) -> None:
        self.the(selector).click()

    def type(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def ask(self, sentence: str) -> list[tuple[str, float, float]]:
        """Types a sentence, as people do, and waits for its answer, weak matches and all."""
        self.open()
        self.the("#query").send_keys(sentence)
        return self.everything()

    def everything(self) -> list[tuple[str, float, float]]:
        """As `moments`, with those that are hidden at first."""
        self.settled()
        if self.all("#weak button"):
            self.press("#weak button")
        return self.moments()

    def moments(self) -> list[tuple[str, float, float]]:
        """(file, start_s, end_s) of the cards, once the answer to what was asked last is there."""
        self.settled()
        labels = self.run("return [...document.querySelectorAll('.open')].map(e => e.ariaLabel)")
        return [read_label(label) for label in labels]

    def settled(self) -> None:
        time.sleep(0.3)  # the page waits so long for the next letter
        until(
            lambda: self.run(
                "return document.readyState === 'complete'"
                " && !document.getElementById('results').hasAttribute('aria-busy')"
            ),
            "the search does not end",
        )

    def first(self) -> tuple[str, float, float]:
        return until(self.moments, "nothing is found")[0]

    def wait_for(self, script: str) -> Any:
        return until(lambda: self.run(f"return {script}"), f"it never holds: {script}")

    def now_s(self) -> float:
        return float(self.run("return document.getElementById('video').currentTime"))

    def picture(self) -> NDArray[np.float64]:
        """What the player shows, 16 × 16 × RGB."""
        pixels = self.run("""
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 16;
            const context = canvas.getContext("2d");
            context.drawImage(document.getElementById("video"), 0, 0, 16, 16);
            return [...context.getImageData(0, 0, 16, 16).data];
        """)
        return np.array(pixels, np.float64).reshape(16, 16, 4)[..., :3]

    def said(self) -> list[dict[str, Any]]:
        """What the console got since the last call: errors and warnings."""
        return [line for line in self.driver.get_log("browser") if line["level"] != "DEBUG"]


def until(probe: Callable[[], Any], complaint: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := probe()):
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)
    return found


def read_label(label: str) -> tuple[str, float, float]:
    file, start, end = re.fullmatch(r"Play (.+), ([\d:.]+) – ([\d:.]+)", label).groups()  # type: ignore[union-attr]
    return file, seconds(start), seconds(end)


def seconds(clock: str) -> float:
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total


def frame_at(path: Path | str, at_s: float) -> Image.Image:
    """The frame that a player shows at a time."""
    shown = None
    for frame in straight_frames(Path(path)):
        if shown is not None and float(frame.time) > at_s + 1e-3:
            break
        shown = frame
    assert shown is not None
    return shown.to_image()


def unlike(picture: NDArray[np.float64], image: Image.Image) -> float:
    """Mean difference in gray levels of 255."""
    small = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64)
    return float(np.abs(small - picture).mean())


@pytest.fixture(scope="module")
def unlocked(chromium: webdriver.Chrome, address: str, api_key: str) -> Page:
    page = Page(chromium, address)
    page.size(WIDE)
    page.open()
    page.the("#key-input").send_keys(api_key, Key.ENTER)
    page.the("#samples img")
    return page


@pytest.fixture
def page(unlocked: Page) -> Iterator[Page]:
    """A browser that has the key. Nothing may go wrong in it: no error, no broken rule of the CSP."""
    unlocked.size(WIDE)
    unlocked.said()
    yield unlocked
    assert unlocked.said() == []


@pytest.fixture(scope="module")
def truth(world: Path) -> list[Any]:
    """Sentences with one right moment each."""
    queries = read_queries(str(world / "truth.jsonl"))
    found = [q for q in queries if q.group in ("seen", "unseen") and len(q.moments) == 1]
    assert len(found) >= 5
    return found


# ── tests ────────────────────────────────────────────────────────────────────────────────────────


def test_a_sentence_finds_its_moment(page: Page, truth: list[Any]) -> None:
    right = 0
    for query in truth[:6]:
        (moment,) = query.moments
        file, start_s, end_s = page.ask(query.text)[0]
        shared_s = min(end_s, moment.end_s) - max(start_s, moment.start_s)
        right += file == Path(moment.video).name and shared_s > 0.5 * (
            moment.end_s - moment.start_s
        )
        assert page.driver.title == f"{query.text} – vsearch"
    assert right >= 5  # the models err now and then: test_pipeline holds how often


def test_the_answer_says_how_many_and_its_bars_fall_from_the_best(page: Page) -> None:
    found = page.ask("a tree")
    assert page.the("#count").text.startswith(f"{len(found)} moments")
    bars = [int(e.get_attribute("aria-valuenow")) for e in page.all(".card .meter")]
    assert bars[0] == 100 and bars == sorted(bars, reverse=True) and bars[-1] < 100
    page.wait_for("[...document.images].filter(i => i.closest('.open')).every(i => i.naturalWidth)")


def test_an_address_can_be_shared_and_back_goes_back(page: Page) -> None:
    found = page.ask("a red car")
    address = page.driver.current_url
    assert "q=a+red+car" in address
    page.the("#query").send_keys(Key.ENTER, Key.CONTROL, "a", Key.NULL, "a boat", Key.ENTER)
    page.wait_for("location.search === '?q=a+boat'")
    page.settled()
    page.driver.back()
    page.wait_for("document.getElementById('query').value === 'a red car'")
    assert page.moments() == found
    page.driver.get(address)
    assert page.moments() == found


def test_a_moment_plays_from_its_first_second(page: Page, truth: list[Any], world: Path) -> None:
    page.ask(truth[1].text)
    file, start_s, _ = page.first()
    page.press(".open")
    page.wait_for("document.getElementById('video').readyState >= 2")
    first_s = page.now_s()
    assert start_s - 0.06 <= first_s < start_s + 3
    page.wait_for(f"document.getElementById('video').currentTime > {first_s + 0.5}")
    page.run("document.getElementById('video').pause()")
    assert unlike(page.picture(), frame_at(world / file, page.now_s())) < 12
    assert page.the("#player-name").text == file and page.all("#player-note") == []
    page.type(Key.ESCAPE)
    assert page.all("#player") == []


def test_a_press_on_the_timeline_seeks(page: Page, truth: list[Any]) -> None:
    page.ask(truth[1].text)
    page.press(".open")
    page.wait_for("document.getElementById('video').readyState >= 2")
    page.run("document.getElementById('video').pause()")
    slider = page.the("#timeline")
    duration_s = float(page.run("return document.getElementById('video').duration"))
    width = slider.rect["width"]
    for share in (0.75, 0.2):
        offset = round((share - 0.5) * width)
        ActionChains(page.driver).move_to_element_with_offset(slider, offset, 0).click().perform()
        assert page.now_s() == pytest.approx(share * duration_s, abs=0.01 * duration_s)
        assert float(slider.get_attribute("aria-valuenow")) == pytest.approx(page.now_s(), abs=0.06)
    page.wait_for("document.getElementById('timeline').ariaValueText.includes('similarity')")
    slider.send_keys(Key.HOME)
    assert page.now_s() == 0
    page.press("#player-close")


def test_the_timeline_is_high_where_the_moment_is(page: Page, truth: list[Any]) -> None:
    page.ask(truth[1].text)
    page.press(".open")
    page.wait_for("document.getElementById('timeline').ariaValueText?.includes('similarity')")
    inside, outside = page.run("""
        const curve = document.getElementById("curve");
        const band = document.querySelector(".band").getBoundingClientRect();
        const left = curve.getBoundingClientRect().left;
        const { width, height } = curve;
        const data = curve.getContext("2d").getImageData(0, 0, width, height).data;
        const tall = { true: [], false: [] };
        for (let x = 0; x < width; x += 1) {
          let painted = 0;
          for (let y = 0; y < height; y += 1) painted += data[4 * (y * width + x) + 3] > 0;
          tall[left + x > band.left && left + x < band.right].push(painted);
        }
        const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
        return [mean(tall.true), mean(tall.false)];
    """)
    assert inside > 2 * outside
    page.press("#player-close")


def test_what_the_browser_cannot_play_is_shown_as_a_preview(page: Page, archive: Path) -> None:
    page.ask("something")
    page.press("#filters-button")
    page.driver.find_element(By.NAME, "path").send_keys(OLD, Key.ENTER)
    file, start_s, _ = page.first()
    assert file == OLD
    page.press(".open")
    assert "cannot play the file itself" in page.the("#player-note").text
    page.wait_for("document.getElementById('video').readyState >= 2")
    page.run("document.getElementById('video').pause()")
    slider = page.the("#timeline")
    assert start_s - 0.06 <= float(slider.get_attribute("aria-valuenow")) < start_s + 3
    for share in (0.2, 0.8):  # also where no preview was loaded before
        offset = round((share - 0.5) * slider.rect["width"])
        ActionChains(page.driver).move_to_element_with_offset(slider, offset, 0).click().perform()
        page.wait_for("!document.getElementById('video').seeking")
        page.wait_for("document.getElementById('video').readyState >= 2")
        page.run("document.getElementById('video').pause()")
        at_s = float(slider.get_attribute("aria-valuenow"))
        assert unlike(page.picture(), frame_at(archive / OLD, at_s)) < 16
    page.press("#player-close")


def test_more_like_this_begins_with_this(page: Page) -> None:
    found = page.ask("a tree")
    page.press(".card:nth-child(2) .like")
    page.the("#chips .chip")
    file, start_s, end_s = page.first()
    assert file == found[1][0] and start_s < found[1][2] and found[1][1] < end_s
    assert "like=" in page.driver.current_url
    page.driver.back()
    page.wait_for("document.getElementById('query').value === 'a tree'")
    assert page.moments() == found


def test_parts_of_a_query_are_chips_that_turn_and_go(page: Page) -> None:
    plain = page.ask("a tree")
    page.press("#add-minus")
    page.type(plain_words := "at night", Key.ENTER)
    without = page.moments()
    assert page.the(".chip.against").text.replace("\n", " ") == f"− without {plain_words}"
    page.press(".chip .sign")
    page.the(".chip:not(.against)")
    together = page.moments()
    assert plain != without != together != plain
    page.press(".chip .remove")
    assert page.moments() == plain and page.all(".chip") == []


@pytest.mark.parametrize("way", ["drop", "paste", "file"])
def test_a_picture_finds_the_clip_it_is_of(
    page: Page, world: Path, tmp_path: Path, way: str
) -> None:
    shots = [json.loads(line) for line in (world / "shots.jsonl").read_text().splitlines()]
    shot = shots[{"drop": 1, "paste": 4, "file": -1}[way]]
    at_s = (shot["start_s"] + shot["end_s"]) / 2
    image = frame_at(world / Path(shot["video"]).name, at_s).resize((1600, 1600))
    image.save(path := tmp_path / "frame.png")
    page.open()
    page.the("#samples img")
    if way == "file":
        page.driver.find_element(By.ID, "file").send_keys(str(path))
    else:
        page.run(
            """
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "frame.png", { type: "image/png" }));
            const shared = { bubbles: true, cancelable: true };
            if (arguments[1] === "paste") {
              document.body.dispatchEvent(new ClipboardEvent("paste", { ...shared, clipboardData: data }));
            } else {
              for (const name of ["dragenter", "dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(name, { ...shared, dataTransfer: data }));
              }
            }
            """,
            base64.b64encode(path.read_bytes()).decode(),
            way,
        )
    chip = page.the(".chip img")
    file, start_s, end_s = page.first()
    assert file == Path(shot["video"]).name and start_s <= at_s <= end_s
    sent = base64.b64decode(chip.get_attribute("src").partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (1024, 1024)
    assert page.all("#drop") == []


def test_what_is_no_picture_is_said_to_be_none(page: Page, tmp_path: Path) -> None:
    (path := tmp_path / "notes.txt").write_text("words")
    page.open()
    page.the("#samples img")
    page.driver.find_element(By.ID, "file").send_keys(str(path))
    assert "notes.txt is no picture" in page.the("#note").text


def test_filters_hold_and_are_taken_away(page: Page, world: Path) -> None:
    every = page.ask("a tree")
    name = sorted(video.name for video in world.glob("*.mp4"))[1]
    page.press("#filters-button")
    page.driver.find_element(By.NAME, "path").send_keys(name[-7:].upper(), Key.ENTER)
    assert {file for file, *_ in page.moments()} == {name}
    page.press(".chip.filter .remove")
    assert page.moments() == every
    page.press("#filters-button")
    page.run("""
        const select = document.querySelector('#tags select[name=camera]');
        select.value = '2';
        select.dispatchEvent(new Event('change', { bubbles: true }));
    """)
    third = sorted(video.name for video in world.glob("*.mp4"))[2]
    assert {file for file, *_ in page.moments()} == {third}
    page.driver.find_element(By.NAME, "from_s").send_keys("0:05", Key.TAB)
    page.driver.find_element(By.NAME, "to_s").send_keys("6", Key.TAB)
    assert all(start_s >= 5 and end_s <= 6 for _, start_s, end_s in page.moments())
    assert [chip.text for chip in page.all(".chip.filter")] == [
        "camera: 2", "from 0:05.0", "to 0:06.0"
    ]  # fmt: skip
    page.press("#filters [type=reset]")
    assert page.moments() == every and page.all(".chip") == []


def test_a_filter_that_makes_no_sense_is_said_in_a_sentence(page: Page) -> None:
    page.open("?q=a+tree&from_s=9&to_s=3")
    until(lambda: "empty" in page.the("#note").text, "nothing is said")
    assert "422" in page.said()[0]["message"]
    page.press("#filters-button")
    field = page.driver.find_element(By.NAME, "from_s")
    field.clear()
    field.send_keys("soon", Key.TAB)
    assert "1:30" in field.get_property("validationMessage")


def test_nothing_found_is_said_honestly(page: Page, corpus: Corpus) -> None:
    (failed,) = [state for state in corpus.states() if state.status == "failed"]
    page.ask("a tree")
    page.press("#filters-button")
    page.driver.find_element(By.NAME, "path").send_keys("nowhere", Key.ENTER)
    empty = page.the("#empty")
    assert "Nothing passes the filters" in empty.text and "1 video could not be read" in empty.text
    page.press("#empty .link")
    row = page.the("#library-list li")
    assert BROKEN in row.text and failed.reason in row.text
    page.type(Key.ESCAPE)
    page.press("#empty .solid")
    assert page.moments() and page.all("#empty") == []


def test_weak_matches_are_hidden_and_can_be_had(page: Page) -> None:
    page.open()
    page.the("#query").send_keys("a giraffe eating leaves")
    page.settled()
    assert page.moments() == []
    assert page.the("#empty").text == "Nothing in the archive matches well"
    said = page.the("#weak p").text
    assert re.fullmatch(r"\d+ weak matches(, and more,)? are hidden\.", said)
    page.press("#weak button")
    weak = until(page.moments, "they are not shown")
    assert len(weak) == int(said.split()[0])
    assert page.all("#weak") == page.all("#empty") == []
    page.the("#query").send_keys(" slowly")  # another sentence begins anew
    page.settled()
    assert page.moments() == [] and "weak" not in page.driver.current_url


def test_the_start_page_says_what_can_be_searched(page: Page, corpus: Corpus) -> None:
    page.open()
    indexed = sum(state.status == "indexed" for state in corpus.states())
    until(lambda: f"{indexed} videos" in page.the("#coverage").text, "coverage is not shown")
    assert page.all(".examples a")
    page.press("#samples button")
    assert page.first()[0]


def test_everything_works_by_keys(page: Page) -> None:
    page.open()
    page.the("#samples img")
    page.run("document.activeElement.blur()")
    page.type("/")
    page.type("a tree")
    found = page.everything()
    page.type("/")
    # Not the one that is shown by previews: each of these counts its time from its own start.
    place = next(n for n, (file, _, _) in enumerate(found) if n and file != OLD)
    page.type(Key.ARROW_DOWN, *[Key.ARROW_RIGHT] * place)
    focused = "return document.activeElement.ariaLabel"
    assert read_label(page.run(focused)) == found[place]
    page.type(Key.ENTER)
    page.the("#player")
    page.wait_for("!document.getElementById('video').paused")
    page.type(Key.SPACE)
    page.wait_for("document.getElementById('video').paused")
    before_s = page.now_s()
    page.type(Key.ARROW_RIGHT, Key.ARROW_RIGHT)
    assert page.now_s() == pytest.approx(before_s + 2, abs=0.01)
    page.type("n")
    until(
        lambda: page.the("#player-place").text.startswith(f"{place + 2} of"),
        "the next is not shown",
    )
    page.type(Key.ESCAPE)
    assert page.all("#player") == [] and read_label(page.run(focused)) == found[place + 1]
    page.type(Key.HOME, Key.ARROW_UP)
    assert page.run("return document.activeElement.id") == "query"


@pytest.mark.parametrize(
    "query", ["", "?q=a+tree&without=night&path=mp4&weak=", "?q=a+tree&path=nowhere"]
)
def test_a_narrow_screen_never_scrolls_sideways(page: Page, query: str) -> None:
    page.size(NARROW)
    page.open(query)
    page.settled()
    widest = "return document.documentElement.scrollWidth"
    assert page.run(widest) <= NARROW[0]
    page.press("#filters-button")
    assert page.run(widest) <= NARROW[0]
    page.press("#filters .solid")
    if "tree&without" in query:
        page.press(".open")
        page.wait_for("document.getElementById('video').readyState >= 2")
        assert page.run(widest) <= NARROW[0]
        assert page.run("return document.getElementById('player').scrollWidth") <= NARROW[0]
        page.press("#player-close")


def test_the_pointer_scrubs_through_a_moment(page: Page) -> None:
    page.ask("a tree")
    card = page.the(".card .open")
    still = card.find_element(By.TAG_NAME, "img").get_attribute("src")
    seen = set()
    for share in (0.1, 0.9):
        offset = round((share - 0.5) * card.rect["width"])
        ActionChains(page.driver).move_to_element_with_offset(card, offset, 0).perform()
        seen.add(
            until(
                lambda: (
                    {card.find_element(By.TAG_NAME, "img").get_attribute("src")} - seen - {still}
                ),
                "the picture stays",
            ).pop()
        )
    ActionChains(page.driver).move_to_element(page.the("#count")).perform()
    assert card.find_element(By.TAG_NAME, "img").get_attribute("src") == still
    at_s = [float(re.search(r"at_s=([\d.]+)", address)[1]) for address in seen]  # type: ignore[index]
    _, start_s, end_s = page.first()
    assert all(start_s - 0.06 <= t <= end_s + 0.06 for t in at_s)


@contextmanager
def answered_by(page: Page, script: str) -> Iterator[None]:
    """The page's searches go to the script's `answer(real, path, options)`; `real` is the service."""
    script = f"""
        const real = window.fetch;
        {script}
        window.fetch = (path, options) =>
          String(path).startsWith("v1/search") ? answer(real, path, options) : real(path, options);
    """
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = page.driver.execute_cdp_cmd(command, {"source": script})
    try:
        yield
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_busy_service_is_asked_once_more(page: Page) -> None:
    script = """
        let refusals = 1;
        const answer = (real, path, options) => (refusals-- > 0
          ? Promise.resolve(new Response("{}", { status: 429, headers: { "Retry-After": "1" } }))
          : real(path, options));
    """
    with answered_by(page, script):
        page.open("?q=a+tree")
        until(lambda: "busy" in page.the("#count").text, "patience is not asked for")
        assert page.first()


def test_an_answer_without_a_part_of_the_index_says_so(page: Page) -> None:
    script = """
        const answer = async (real, path, options) => {
          const found = await (await real(path, options)).json();
          return Response.json({ ...found, partial: true, missing: ["part 2 of 4 is late"] });
        };
    """
    with answered_by(page, script):
        page.open("?q=a+tree")
        assert page.first()
        until(lambda: "part 2 of 4 is late" in page.the("#note").text, "nothing is said")
    page.press("#note button")


def test_what_was_found_can_be_taken_away_as_a_table(page: Page, tmp_path: Path) -> None:
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    shown = page.ask("a tree")
    page.press("#export summary")
    page.press("#export button[value=csv]")
    file = tmp_path / "moments.csv"
    until(file.exists, "no file comes")
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [Path(row["video"]).name for row in rows] == [name for name, _, _ in shown]
    for row, (_, start_s, end_s) in zip(rows, shown, strict=True):
        times = (float(row["start_s"]), float(row["end_s"]))
        assert times == pytest.approx((start_s, end_s), abs=0.5)


def test_a_service_that_went_away_is_said_to_be_away(page: Page) -> None:
    page.ask("a tree")
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/search*"]})
    try:
        page.the("#query").send_keys(" and a boat")
        until(lambda: "cannot be reached" in page.the("#note").text, "nothing is said")
        assert page.all(".card") == []
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.said()
    page.press("#note button")
    assert page.everything()


def test_a_key_is_asked_for_and_then_the_search_goes_on(page: Page, api_key: str) -> None:
    page.driver.delete_all_cookies()
    page.open("?q=a+tree")
    page.the("#key-input").send_keys("not the key", Key.ENTER)
    until(lambda: "does not fit" in page.the("#key-note").text, "the wrong key is not refused")
    page.type(api_key, Key.ENTER)
    assert page.first()
    assert page.run("return document.cookie") == ""  # scripts cannot read it
    page.open()
    page.press("#logout")
    page.the("#key-input").send_keys(api_key, Key.ENTER)  # asked for again
    assert page.the("#samples img")
    page.said()
