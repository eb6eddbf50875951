"""Puts the page together: the modules of `assets`, the style, and the data become one HTML file that requests nothing.

What the data are is in `models`, `texts` and `runs`. The page also works when it is opened from a disk.
"""

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from string import Template
from typing import Any

ASSETS = Path(__file__).parent / "assets"
IMPORT = re.compile(r'^import \{.*\} from "\./(\w+\.js)";\n', re.MULTILINE)


def bundle(entry: str) -> str:
    """The source of a JavaScript module after all that it imports, as one script: names are unique over all modules."""
    sources: dict[str, str] = {}

    def add(name: str) -> None:
        if name not in sources:
            source = (ASSETS / name).read_text("utf-8")
            for imported in IMPORT.findall(source):
                add(imported)
            sources[name] = re.sub(r"^export ", "", IMPORT.sub("", source), flags=re.MULTILINE)

    add(entry)
    script = "".join(sources.values())
    assert "</script" not in script, "it would end the script element"
    assert "<!--" not in script, "it would hide the end of the script element"
    return script


def content_policy(script: str, style: str, live: bool) -> str:
    """A Content-Security-Policy that allows this script and this style, and no request but those of a live page."""

    def sha(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {"default-src": "'none'", "script-src": sha(script), "style-src": sha(style), "worker-src": "blob:"}
    rules |= {"connect-src": "'self'"} if live else {}
    rules |= {"base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def data_element(name: str, content: bytes) -> str:
    """Data as base64, which holds no character that HTML gives a meaning."""
    return f'<script type="text/plain" id="{name}">{base64.b64encode(content).decode()}</script>'


def render_page(payload: dict[str, Any], weights: list[bytes]) -> str:
    """The HTML file.

    Args:
        payload: What the scripts read; its `live` says whether the page asks its server for newer runs.
        weights: The float16 weights of each model in `payload`.
    """
    page, style = bundle("app.js"), (ASSETS / "style.css").read_text("utf-8")
    packed = gzip.compress(json.dumps(payload, allow_nan=False).encode(), mtime=0)
    data = [data_element("payload", packed), *(data_element(f"weights-{i}", w) for i, w in enumerate(weights))]
    return Template((ASSETS / "page.html").read_text("utf-8")).substitute(
        csp=content_policy(page, style, payload["live"]), title=html.escape(payload["title"]), style=style,
        data="\n".join(data), worker=bundle("worker.js") if weights else "", page=page,
    )  # fmt: skip
