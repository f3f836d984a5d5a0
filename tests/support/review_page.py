"""A person answers in the form on a flow run's page, in either of Prefect's interfaces."""

from pathlib import Path
from typing import Any, Literal

from support.chromium import Page


def answer_on_page(
    page: Page,
    ui_url: str,
    flow_run_id: Any,
    ui: Literal["v1", "v2"],
    decision: str,
    feedback: str,
    screenshot: Path,
    *,
    round: int,  # noqa: A002 - the word of the domain
) -> None:
    """Open the flow run's page, its form, read it, fill it in and submit it.

    The form is about a task `draft` whose output has `number N` and `<b>for you</b>` in it.
    """
    page.open(f"{ui_url}{'/v2' if ui == 'v2' else ''}/runs/flow-run/{flow_run_id}")
    if ui == "v1":
        page.click('role=button[name="Resume"]')
        select, submit = ".p-select-button__control", "Submit"
    else:
        page.click("button[aria-haspopup='menu']")
        page.click('role=menuitem[name="Resume"]')
        select, submit = '[aria-label="Select Decision"]', "Resume"
    dialog = ".p-modal__card" if ui == "v1" else '[role="dialog"]'
    page.wait_for_text(f"number {round}")
    shown = page.text(dialog)
    assert f"asks about task draft, question {round}." in " ".join(shown.split())
    # Between "<" and the name of a tag stands a character without width, so that no tag begins.
    assert "<b>for you</b>" in shown.replace("\u2060", ""), "the crew's markup is text"
    assert "number 1" not in shown or round == 1
    page.raw(lambda playwright: playwright.locator(f"{dialog} {select}").first.press("Space"))  # as with the keyboard
    page.raw(lambda playwright: playwright.get_by_text(decision, exact=True).last.click())
    page.fill(f"{dialog} textarea >> nth=0", feedback)
    page.fill(f"{dialog} textarea >> nth=1", "Grace")
    page.screenshot(screenshot, whole=False)
    answers: list[str] = []  # of the server to the page's POSTs from now on
    page.raw(
        lambda playwright: playwright.on(
            "response", lambda got: answers.append(f"{got.request.method} {got.status} {got.url}")
        )
    )
    for _ in range(3):  # a database that was busy for too long is one click for nothing
        page.click(f'{dialog} >> role=button[name="{submit}"]')
        if _is_gone(page, dialog):
            return
    raise AssertionError(f"the form stays, after {[one for one in answers if one.startswith('POST')]}")


def _is_gone(page: Page, dialog: str) -> bool:
    from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

    try:
        page.raw(lambda playwright: playwright.locator(dialog).first.wait_for(state="hidden", timeout=15_000))
    except PlaywrightTimeoutError:
        return False
    return True
