"""The picture of the playground, of a server that runs:

python docs/scripts/playground_picture.py http://127.0.0.1:8000/ docs/images/playground.png
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PROMPT = "The function returns"
SETTINGS = {"Temperature": "0.7", "Most new tokens": "60", "Seed": "5"}


def write(page: Page) -> None:
    """An answer, and one of its tokens chosen."""
    expect(page.locator("#model")).not_to_have_text("No model yet")
    for name, value in SETTINGS.items():
        page.get_by_label(name).fill(value)
    page.locator("#text").fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled(timeout=120_000)
    page.locator(".answer .tok").nth(11).hover()


with sync_playwright() as running:
    chromium = running.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    page = chromium.new_page(viewport={"width": 1240, "height": 830}, color_scheme="light")
    page.goto(sys.argv[1])
    write(page)
    shot = Image.open(BytesIO(page.screenshot()))
    shot.quantize(128, dither=Image.Dither.NONE).save(sys.argv[2], optimize=True)
