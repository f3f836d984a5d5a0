"""HTTP as bytes, for requests that no client would send."""

import asyncio
import contextlib
from collections.abc import Mapping


def request(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return one HTTP/1.1 request that closes its connection, with a Content-Length unless `headers` say otherwise."""
    known = {"Host": "receiver", "Connection": "close", "Content-Type": "application/json"}
    known |= {"Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in {**known, **(headers or {})}.items() if value]
    return "\r\n".join((f"{method} {path} HTTP/1.1", *lines, "", "")).encode("latin-1") + body


async def exchange(port: int, *parts: bytes, pause: float = 0.0, within: float = 30.0) -> int | None:
    """Send parts with pauses between them, in seconds, and return the status of the answer; None if there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None
    try:
        for number, part in enumerate(parts):
            if number and pause:
                await asyncio.sleep(pause)
            writer.write(part)
            await writer.drain()
        head = await asyncio.wait_for(reader.readline(), within)
    except (OSError, ValueError):
        # Answered before all was sent, the connection may be closed with the answer unread.
        return None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    words = head.split()
    return int(words[1]) if len(words) > 1 else None
