"""nginx with the server that a page of the documentation shows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.deployed import ROOT
from support.docs import read_page
from support.processes import Process

CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/nginx.log;
{user}
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{server}
}}
"""


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
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, server=server, user=user))
    return Process([program, "-p", str(folder), "-c", str(configuration)], log=folder / "said.log")
