"""The page as a person uses it, in Debian's chromium: dropping, painting, answering, saving.

Without that browser these tests are skipped. MVG_BROWSER=1, as in CI, makes its absence an error.
"""

import os
import shutil
import time

import numpy as np
import pytest
from test_app import Page, by_infer

from scans.volumes import read_volume

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER) and not os.environ.get("MVG_BROWSER"):
    pytest.skip("no browser here (apt-get install chromium chromium-driver)",
                allow_module_level=True)

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

pytestmark = pytest.mark.xdist_group("browser")


class Person:
    """Someone in front of the page."""

    def __init__(self, driver, page, downloads):
        self.driver, self.page, self.downloads = driver, page, downloads

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def scan(self, n):
        """The n-th scan that the page made, counted from 1."""
        return [scan for number, scan in self.page.session.scans.items() if number][n - 1]

    @staticmethod
    def until(holds, seconds=20):
        end = time.time() + seconds
        while not holds():
            assert time.time() < end
            time.sleep(0.05)

    @property
    def status(self):
        return self.find("#status").text

    def wait(self, words, seconds=60):
        end = time.time() + seconds
        while words not in self.status:
            assert time.time() < end, f"waited for {words!r}, the page says {self.status!r}"
            time.sleep(0.05)

    def drop(self, side, role, *paths):
        field = self.find(f"#{side} .drop[data-role={role}] input")
        field.send_keys("\n".join(map(str, paths)))

    def click(self, selector):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})",
                                   self.find(selector))
        self.find(selector).click()

    def choose_tool(self, side, tool):
        self.click(f"#{side} [name=tool-{side}][value={tool}]")

    def drag(self, side, start, *ends):
        """Drag over the picture. Points are shares (x, y) of it."""
        canvas = self.find(f"#{side} canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        width, height = canvas.size["width"], canvas.size["height"]

        def offset(point):
            return round((point[0] - 0.5) * width), round((point[1] - 0.5) * height)

        chain = ActionChains(self.driver, duration=20)
        chain.move_to_element_with_offset(canvas, *offset(start)).click_and_hold()
        for end in ends:
            chain.move_to_element_with_offset(canvas, *offset(end))
        chain.release().perform()

    def set_range(self, selector, value):
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            self.find(selector), value)

    def save(self, button):
        """Press a button that saves a file; the file."""
        before = set(self.downloads.iterdir())
        self.click(button)
        for _ in range(400):
            new = [f for f in set(self.downloads.iterdir()) - before
                   if not f.name.endswith((".crdownload", ".tmp")) and not f.name.startswith(".")]
            if new:
                return new[0]
            time.sleep(0.05)
        raise AssertionError(f"nothing was saved; the page says {self.status!r}")

    def pixel(self, side, x, y):
        """The color of the picture at a share (x, y) of it."""
        return self.driver.execute_script(
            "const c = arguments[0], g = c.getContext('2d');"
            "const x = arguments[1] * c.width, y = arguments[2] * c.height;"
            "return [...g.getImageData(x, y, 1, 1).data]",
            self.find(f"#{side} canvas"), x, y)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--window-size=1300,1400"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def person(driver, tmp_path):
    """A person with the page freshly opened, whose downloads go to a folder of the test's."""
    page = Page()
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    driver.execute_cdp_cmd("Browser.setDownloadBehavior",
                           {"behavior": "allow", "downloadPath": str(downloads)})
    driver.set_window_size(1300, 1400)
    driver.get(page.server.address)
    yield Person(driver, page, downloads)
    page.close()
    known = ("400 (Bad Request)", "willReadFrequently")  # the last one is `pixel`'s
    errors = [entry["message"] for entry in driver.get_log("browser")
              if not any(word in entry["message"] for word in known)]
    assert errors == []


@pytest.mark.slow
def test_a_volume_painted_by_mouse_is_answered_corrected_and_saved(person, hearts, tmp_path):
    person.wait("Drop an example scan")
    person.drop("example", "scan", hearts[0][0])
    person.wait("paint a mask")
    person.set_range("#example .slice", 4)
    person.until(lambda: person.find("#example .where").text.startswith("4 of"))
    person.choose_tool("example", "brush")
    gray = person.pixel("example", 0.5, 0.5)
    person.drag("example", (0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.5), (0.5, 0.5))
    person.wait("Drop one or several new scans")
    red = person.pixel("example", 0.5, 0.5)
    assert red[0] > red[1] + 40 and gray[0] == gray[1]
    person.click("#example .classes > button")  # a second class
    person.drag("example", (0.2, 0.2), (0.3, 0.2))
    person.choose_tool("example", "eraser")
    person.drag("example", (0.6, 0.6), (0.6, 0.6))
    person.click("#example .undo")
    person.set_range("#example .slice", 6)
    person.until(lambda: person.find("#example .where").text.startswith("6 of"))
    person.choose_tool("example", "brush")
    person.drag("example", (0.4, 0.4), (0.6, 0.6))
    person.drop("input", "scan", hearts[1][0])
    person.wait("Press Answer")
    assert "task segmentation" in person.find("#notes").text
    painted = person.scan(1).painted
    assert sorted(painted) == [3, 5]
    assert set(np.unique(painted[3])) == {0, 1, 2} and set(np.unique(painted[5])) == {0, 2}
    H, W = painted[3].shape
    assert painted[3][round(0.6 * H) - 1, round(0.6 * W) - 1] == 1  # the eraser was undone
    person.click("#answer")
    person.wait("Answered")
    packed = person.save("#save-example")
    shutil.unpack_archive(packed, tmp_path / "painted")
    label, image = sorted((tmp_path / "painted").glob("*.nii.gz"),
                          key=lambda p: "_label" not in p.name)
    ours = read_volume(person.save("#save-answer"))
    theirs = by_infer(image, label, hearts[1][0], tmp_path / "infer")
    np.testing.assert_array_equal(ours.array, theirs.array)
    assert "ml" in person.find("#input .classes").text or not ours.array.any()
    # Correct a slice, and use it as a further example.
    person.set_range("#input .slice", 5)
    person.choose_tool("input", "brush")
    person.until(lambda: person.find("#input .where").text.startswith("5 of"))
    person.drag("input", (0.5, 0.5), (0.55, 0.5))
    person.until(lambda: person.scan(2).painted)
    person.click("#keep")
    person.wait("Answered")
    assert len(person.driver.find_elements(By.CSS_SELECTOR, "#example .scans button")) == 2
    assert person.scan(3).example.labels.any()
    person.click("#answer")
    person.wait("Answered")
    notes = person.find("#notes").text
    assert notes.count("task segmentation") == 2


def test_a_picture_with_its_mask(person, nerves, tmp_path):
    person.drop("example", "scan", nerves[0][0])
    person.wait("answer")
    person.drop("example", "label", nerves[0][1])
    person.wait("Drop one or several new scans")
    person.drop("input", "scan", nerves[1][0])
    person.wait("Press Answer")
    person.click("#answer")
    person.wait("Answered")
    ours = read_volume(person.save("#save-answer"))
    theirs = by_infer(*nerves[0], nerves[1][0], tmp_path / "infer")
    assert theirs.array.any()
    np.testing.assert_array_equal(ours.array, theirs.array)


@pytest.mark.slow
def test_two_scans_are_answered_one_after_the_other(person, hearts):
    person.drop("example", "scan", hearts[0][0])
    person.wait("answer")
    person.drop("example", "label", hearts[0][1])
    person.wait("Drop one or several new scans")
    person.drop("input", "scan", hearts[1][0], hearts[2][0])
    person.wait("Press Answer")
    person.click("#answer")
    person.wait("Answered")
    answers = [person.scan(n).answer for n in (2, 3)]
    assert all(answer is not None and answer.any() for answer in answers)
    person.click("#input .scans button:first-child")
    first = read_volume(person.save("#save-answer"))
    cut = person.scan(2).cut
    np.testing.assert_array_equal(cut.cut(first.array), answers[0])


@pytest.mark.slow
def test_stop_ends_an_answer_and_keeps_what_is_there(person, hearts, tmp_path):
    import nibabel

    scan = nibabel.load(hearts[1][0])
    long = tmp_path / "long.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.tile(np.asarray(scan.dataobj), (1, 1, 25)), scan.affine),
                 long)
    person.drop("example", "scan", hearts[0][0])
    person.wait("answer")
    person.drop("example", "label", hearts[0][1])
    person.wait("Drop one or several new scans")
    person.drop("input", "scan", long)
    person.wait("Press Answer")
    person.click("#answer")
    person.wait("of long.nii.gz")
    assert float(person.find("#progress").get_attribute("value")) > 0
    person.click("#stop")
    person.wait("Stopped", 15)
    answer = person.scan(2).answer
    assert answer[0].size and not answer[-1].any()
    assert person.save("#save-answer").stat().st_size > 0


@pytest.mark.slow
def test_a_broken_file_is_said_in_place_and_the_page_goes_on(person, hearts, tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(hearts[0][0].read_bytes()[:5000])
    person.drop("example", "scan", broken)
    person.wait("broken.nii.gz cannot be read")
    assert "error" in person.find("#status").get_attribute("class")
    assert "/tmp" not in person.status
    person.drop("example", "scan", hearts[0][0])
    person.wait("paint a mask")
    person.drop("example", "label", hearts[1][1])  # of another heart
    person.wait("its image")
    person.drop("example", "label", hearts[0][1])
    person.wait("Drop one or several new scans")
    person.drop("example", "label", hearts[1][1])  # wrong again: the one before stays
    person.wait("its image")
    person.drop("input", "scan", hearts[2][0])
    person.wait("Press Answer")
    person.click("#example .remove")
    person.wait("Drop an example scan")


@pytest.mark.slow
def test_painting_does_not_move_to_other_slices(person, tmp_path):
    import nibabel

    cube = tmp_path / "cube.nii.gz"
    values = np.random.default_rng(0).integers(0, 500, (40, 40, 40)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), cube)
    person.drop("example", "scan", cube)
    person.wait("paint a mask")
    person.choose_tool("example", "brush")
    person.drag("example", (0.3, 0.3), (0.6, 0.6))
    person.wait("Drop one or several")
    person.click("#assumed [name=modality] [value=ct]")
    person.until(lambda: person.scan(1).stack.low_high == (-100, 200))
    person.until(lambda: person.scan(1).painted)  # the same slices: it stays
    person.click("#assumed [name=axis] option:nth-child(3)")
    person.wait("is gone")
    assert not person.scan(1).painted


@pytest.mark.slow
def test_a_keyboard_alone_is_enough(person, hearts):
    body = person.find("body")
    person.find("#try").send_keys(Keys.ENTER)
    person.wait("Press Answer")
    canvas = person.find("#example canvas")
    before = person.find("#example .slice").get_attribute("value")
    canvas.send_keys(Keys.ARROW_UP)
    canvas.send_keys(Keys.PAGE_UP)
    person.until(lambda: int(person.find("#example .slice").get_attribute("value"))
                 == int(before) - 2)
    person.find("#example [name=tool-example][value=window]").send_keys(Keys.ARROW_RIGHT)
    assert person.find("#example [name=tool-example][value=brush]").is_selected()
    canvas.send_keys(Keys.ARROW_RIGHT * 30 + Keys.ARROW_DOWN * 20 + " ")
    person.wait("Press Answer")
    k = int(before) - 3
    painted = person.scan(1).painted[k]
    assert painted[20, 30] == 1
    # Everything is reached with the Tab key.
    reached = set()
    body.send_keys(Keys.NULL)
    for _ in range(80):
        ActionChains(person.driver).send_keys(Keys.TAB).perform()
        active = person.driver.switch_to.active_element
        reached.add(active.get_attribute("id") or active.get_attribute("class")
                    or active.get_attribute("name") or active.tag_name)
    assert {"try", "answer", "slice", "undo paints", "canvas", "task", "modality"} <= reached
    person.find("#answer").send_keys(Keys.ENTER)
    person.wait("Answered")
    assert person.save("#save-answer").name == "new_heart_mvg.nii.gz"


@pytest.mark.slow
def test_it_fits_a_phone(person, hearts):
    person.driver.set_window_size(500, 900)
    person.click("#try")
    person.wait("Press Answer")
    wide, window = person.driver.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window
    assert person.find("#input").location["y"] > person.find("#example").location["y"] + 300
