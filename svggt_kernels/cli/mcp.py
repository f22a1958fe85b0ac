"""`mcp DIR`: tools for agents, over stdio or over HTTP on this machine."""

from __future__ import annotations

import argparse
import sys

from ..packages import optional
from .arguments import MCP_PORT
from .errors import refusals


def run(arguments: argparse.Namespace) -> int:
    """Serve until the client leaves, or until interrupted; return the exit code."""
    with refusals():
        optional("mcp.server", "the MCP server", "mcp", "'svggt-kernels[mcp]'")
        from ..serving.server import build_server

        server = build_server(arguments.folders)
    if arguments.http:
        port = arguments.port or MCP_PORT
        print(f"  serving http://127.0.0.1:{port}/mcp; Ctrl-C ends it", file=sys.stderr)
        server.run("streamable-http", host="127.0.0.1", port=port)
    else:
        server.run("stdio")
    return 0
