"""A page in a real browser: a script that looks at it says what it saw in the title."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def probed(page: str, probe: str, folder: Path, width: int = 800) -> dict[str, Any]:
    """The json that `probe`, a script, writes into the title of a page of html; skips where there is no chromium."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    path = folder / "probe.html"
    path.write_text(page.replace("</body>", f"{probe}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={folder}/profile", f"--window-size={width},900", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, timeout=200)
    title = re.search("<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title.group(1)))
