"""The OpenAPI document is what the front does: tools that read nothing else find no contradiction, and can ask."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running_front import Front, MakeFront

from checkout import ROOT

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# A deadline of nanoseconds passes; whoever names one expects it.
EXPECTED = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""
ASK = """
import sys
sys.path.insert(0, sys.argv[1])
from blendmaskd_client import Client
from blendmaskd_client.api.default import segment, categories
from blendmaskd_client.models import SegmentMaskFormat
from blendmaskd_client.types import File
client = Client(base_url=sys.argv[2])
with open(sys.argv[3], "rb") as image:
    found = segment.sync(client=client, body=File(payload=image, mime_type="application/octet-stream"),
                         mask_format=SegmentMaskFormat.RLE)
print(found.width, found.height, found.detections[0].category_name, len(categories.sync(client=client)))
"""


def test_every_route_is_in_the_document(shared_front: Front) -> None:
    document = shared_front.ask("GET", "/openapi.json").tree
    routes = {path for path in document["paths"] if "{" not in path}
    for path in routes:
        method = next(iter(document["paths"][path])).upper()
        assert shared_front.ask(method, path).status in (200, 404, 422), path
    listed = shared_front.ask("GET", "/nowhere").tree["detail"]
    assert {"/v1/segment", "/v1/jobs", "/v1/categories", "/v1/stats"} <= {word.strip(",;") for word in listed.split()}


def test_the_page_shows_it_without_a_network(shared_front: Front) -> None:
    page = shared_front.ask("GET", "/docs")
    text = page.body.decode()
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for path in shared_front.ask("GET", "/openapi.json").tree["paths"]:
        assert path in text


@pytest.mark.slow
def test_schemathesis_finds_nothing(daemon: Any, front: MakeFront, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    here = front(daemon(spool=str(tmp_path / "spool.sqlite")), daemon_wait_s=10)
    (tmp_path / "schemathesis.toml").write_text(EXPECTED)
    command = [sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run", f"{here.url}/openapi.json", "--checks",
               CHECKS, "--max-examples", "5", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tried = re.search(r"Tested: (\d+)", done.stdout)
    assert tried
    assert int(tried[1]) == sum(map(len, here.ask("GET", "/openapi.json").tree["paths"].values()))


@pytest.mark.slow
def test_a_generated_client_segments(shared_front: Front, tmp_path: Path) -> None:
    pytest.importorskip("openapi_python_client")
    document = shared_front.ask("GET", "/openapi.json").tree
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    generate = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none",
                "--output-path", "blendmaskd_client"]
    made = subprocess.run(generate, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    photo = ROOT / "configs" / "demo" / "images" / "0003.jpg"
    asked = subprocess.run([sys.executable, "-c", ASK, tmp_path, shared_front.url, photo],
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert asked.stdout == "383 259 image 80\n", asked.stderr + made.stdout
