"""A page as a real browser shows it: headless Chromium, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")

# The page stands in a frame of the asked width: a window has a least width, a frame has none.
FRAME = """<!doctype html><html><body style="margin:0">
<iframe id="frame" src="{url}" style="border:0; width:{width}px; height:900px"></iframe>
<pre id="measured"></pre><script>
const frame = document.getElementById("frame");
frame.onload = () => setTimeout(() => {{
  const view = frame.contentWindow, page = frame.contentDocument;
  const measure = {measure};
  document.getElementById("measured").textContent = JSON.stringify(measure(view, page));
}}, 1000);
</script></body></html>"""


def visit(page: Path, width: int, measure: str) -> tuple[Any, list[str]]:
    """What a JavaScript function of (window, document) finds in a page; and the console's lines."""
    wrapper = page.with_name(f"{page.stem}-in-a-frame.html")
    wrapper.write_text(FRAME.format(url=page.resolve().as_uri(), width=width, measure=measure))
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", "--allow-file-access-from-files"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--touch-events=enabled"),
            *(f"--user-data-dir={page.parent / 'browser'}", "--window-size=1300,1000"),
            *("--virtual-time-budget=20000", "--dump-dom", wrapper.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(found[1])), console
