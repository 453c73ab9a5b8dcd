"""Pages as a real browser shows them: headless Chromium, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")

# A frame has the width that it is given; a window has a least width.
FRAMES = """<!doctype html><html><body>{frames}<pre id="measured"></pre><script>
onload = () => setTimeout(() => {{
  const measure = {measure};
  const found = [...document.querySelectorAll("iframe")].map(
    frame => measure(frame.contentWindow, frame.contentDocument));
  document.getElementById("measured").textContent = JSON.stringify(found);
}}, 500);
</script></body></html>"""


def visit(pages: Sequence[tuple[Path, int]], measure: str) -> tuple[list[Any], list[str]]:
    """What a JavaScript function of (window, document) finds in each page at its width (pixels).

    Also the lines that the browser's console got, each with the address of its page.
    """
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}" style="width:{width}px; height:800px; border:0">'
        "</iframe>"
        for page, width in pages
    )
    directory = pages[0][0].parent
    wrapper = directory / "frames.html"
    wrapper.write_text(FRAMES.format(frames=frames, measure=measure))
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", "--allow-file-access-from-files"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--touch-events=enabled"),
            *(f"--user-data-dir={directory / 'browser'}", "--window-size=1400,1000"),
            *("--virtual-time-budget=30000", "--dump-dom", wrapper.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found[1])), console
