"""nginx with the server that a page of the documentation shows."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.deployed import ROOT
from support.docs import read_page
from support.processes import Process


def start_nginx(folder: Path, page: str, changes: Mapping[str, str]) -> Process:
    """Start nginx with the server of a page in docs/guides."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("needs nginx (Debian: apt-get install nginx-light)")
    blocks = read_page(ROOT, ROOT / "docs" / "guides" / page).blocks
    (server,) = [block.code for block in blocks if block.code.startswith("server {")]
    for there, here in changes.items():
        assert there in server
        server = server.replace(there, here)
    user = "user root;" if os.geteuid() == 0 else ""
    # Relative to `folder`. As nginx is built, these would be folders of the machine.
    places = "".join(f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    http = f"http {{\naccess_log access.log;\n{places}{server}\n}}\n"
    (folder / "nginx.conf").write_text(f"daemon off;\npid pid;\nerror_log nginx.log;\n{user}\nevents {{}}\n{http}")
    return Process([program, "-p", folder, "-c", folder / "nginx.conf"], log=folder / "said.log")
