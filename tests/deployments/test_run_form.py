"""The form on Prefect's page that starts a run: it asks for each parameter and says what it is, in both interfaces."""

from __future__ import annotations

from typing import Literal

import pytest

from support.chromium import Chromium
from support.site import Site

SAID = {
    "one-crew/daily": ["The name of the crew's block, as under Blocks.", "The identity of one purchase."],
    "report-pipeline/weekly": ["What the report is about.", "Whom it is for."],
    "fan-out/cities": ["The crew's inputs, once for each run.", "How many runs may be in flight."],
}


@pytest.mark.parametrize("ui", ["v1", "v2"])
@pytest.mark.parametrize("name", SAID)
def test_every_parameter_is_described(site: Site, chromium: Chromium, name: str, ui: Literal["v1", "v2"]):
    deployment = site.deployment(name)["id"]
    root = site.server.ui_url + ("/v2" if ui == "v2" else "")
    with chromium.page(height=1800) as page:
        page.open(f"{root}/deployments/deployment/{deployment}/run")
        for text in SAID[name]:
            page.wait_for_text(text)
        page.screenshot(site.folder / f"{name.replace('/', '-')}-{ui}.png")
