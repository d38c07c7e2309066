"""What a page of report.py shows in a browser, and what is chosen there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=alert(1)>"


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for a condition, which the browser may take a moment to meet; returns its value."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(None, seconds, 0.1).until(lambda _: condition())


def check_console_and_requests(browser: Any, address: str) -> None:
    """No error was logged, and nothing was asked for but `address`, since the last time."""
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    own = {url.split("#")[0] for url in urls if url.startswith(("file:", "http"))}
    assert {url.split(":")[0] for url in urls} <= {"file", "http", "data", "blob", "about"}
    assert own <= {address.split("#")[0], address.split("#")[0] + "?"}


def opened(browser: Any, page: Path | str) -> None:
    """Open a page, and check that it draws its charts, logs no error and asks for nothing outside itself."""
    address = page.as_uri() if isinstance(page, Path) else page
    browser.get("about:blank")  # the same page with another state would not be loaded anew
    browser.get_log("performance")
    browser.get_log("browser")  # of a page whose server has ended with the test before
    browser.get(address)
    drawn = (
        "const charts = [...document.querySelectorAll('[data-figure], #panels > div')];"
        "return charts.length && charts.every(chart => chart.querySelector('.main-svg'))"
    )
    wait_until(lambda: browser.execute_script(drawn), 30)
    check_console_and_requests(browser, address)


def curves(browser: Any, chart: str | None = None) -> list[dict[str, Any]]:
    """The curves that are drawn, with name, x and y, of one chart or of all; without the faint ones and the bands."""
    script = """return [...document.querySelectorAll('#panels > div')]
        .filter(panel => arguments[0] === null || panel.dataset.name === arguments[0])
        .flatMap(panel => panel.data.filter(trace => trace.hoverinfo !== 'skip')
            .map(({name, x, y, line}) => ({name, x: [...x], y: [...y], dash: line.dash, width: line.width})))"""
    return browser.execute_script(script, chart)


def shown(browser: Any) -> list[str]:
    """The names of the curves that are drawn."""
    return [curve["name"] for curve in curves(browser)]


def charts(browser: Any) -> list[str]:
    """The names of the charts that are drawn."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#panels > div')].map(panel => panel.dataset.name)"
    )


def choose(browser: Any, **controls: Any) -> None:
    """Set controls of the page, as a user does."""
    script = """const control = document.querySelector('form').elements[arguments[0]], value = arguments[1];
        if (typeof value === 'boolean') control.checked = value; else control.value = value;
        control.dispatchEvent(new Event('input', {bubbles: true}))"""
    for name, value in controls.items():
        browser.execute_script(script, name, value)
