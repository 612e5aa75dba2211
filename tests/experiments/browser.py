"""Opens a report in headless Chromium."""

import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HAS_BROWSER = bool(shutil.which("chromium") and shutil.which("chromedriver"))


def open_and_click(page: Path) -> None:
    """Opens a page; checks that a click on the first legend entry hides its curve, without logged errors."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1200,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(page.as_uri())
        driver.implicitly_wait(20)
        entry = driver.find_element(By.CSS_SELECTOR, ".legendtoggle")
        visible = "return document.querySelector('.js-plotly-plot').data[0].visible"
        assert driver.execute_script(visible) in (None, True)
        webdriver.ActionChains(driver).scroll_to_element(entry).move_to_element(entry).click().perform()
        WebDriverWait(driver, 20).until(lambda browser: browser.execute_script(visible) == "legendonly")
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()
