"""Renders a page from its template, as one file that opens offline.

The page contains its own scripts and forbids all others: a content security policy names the two scripts by
their hashes, and nothing is fetched. The template escapes all text of models, prompts and names.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from reflux.reports.chart import Chart


def rendered(template: str, page: Mapping[str, Any], charts: Iterable[Chart]) -> str:
    """The text of a page. template: a file in `assets`. page: the values that it shows. charts: all charts
    among them; the library that draws them is left out if there is nothing to draw.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs()
    assets = {
        name: resources.files("reflux.reports").joinpath("assets", name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    }
    environment = Environment(
        loader=PackageLoader("reflux.reports", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {
        **page,
        "css": assets["page.css"],
        "script": assets["page.js"],
        "hashes": [_hash(assets["page.js"]), _hash(library)],
        # compressed to a third of its size; the browser unpacks it
        "library": base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode(),
        "drawn": any(chart.figure is not None for chart in charts),
    }
    return environment.get_template(template).render(shown)


def _hash(script: str) -> str:
    """The hash that names a script in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
