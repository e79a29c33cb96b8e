"""What several test files need: one thread and the same random numbers in whatever order tests run, a fresh compiler,
the data sets where they are, and a Chromium for the tests of the site where there is one (GINI_LOSS_CHROMIUM and
GINI_LOSS_CHROMEDRIVER name other places)."""

import os
import shutil

import pytest
import torch

CHROMIUM = os.environ.get("GINI_LOSS_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = os.environ.get("GINI_LOSS_CHROMEDRIVER") or shutil.which("chromedriver")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    "No compiled code of earlier tests, and none left for later ones"
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def code_generator(fresh_compiler):
    "Skips where torch.compile's own code generator does not work"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as e:
        pytest.skip(f"torch.compile does not work here ({type(e).__name__})")


def data_folder(*parts):
    "A folder in fastai's data folder; skips if it is not there"
    external = pytest.importorskip("fastai.data.external")
    folder = external.fastai_path("data").joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"{'/'.join(parts)} is not in fastai's data folder")
    return folder


@pytest.fixture
def cifar100_folder():
    return data_folder("cifar100", "train").parent


@pytest.fixture
def caltech101_folder():
    return data_folder("caltech101", "101_ObjectCategories").parent


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium with its driver; skips where there is none"
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver here (Debian: chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def set_width(browser):
    "Sets the width of the page; below 500 pixels as a phone that has touch"

    def change(width):
        phone = width < 500
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})

    return change
