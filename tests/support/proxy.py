"""A TCP proxy in front of a server: it counts requests, and can be cut, as a network can."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import Self

from support.prefect_server import PrefectServer, drain, environment

_REQUEST_LINE = re.compile(rb"(?:^|\r\n)(GET|POST|PUT|PATCH|DELETE) (\S+) HTTP/1\.1\r\n")


class Proxy:
    """Listens on a free loopback port and passes everything on to another; a context manager."""

    def __init__(self, target_port: int) -> None:
        self.requests: list[str] = []
        self.refuse: str | None = None
        self.answer = "403"
        """The status that refused requests get; empty: the connection is closed."""
        self.lose: str | None = None
        """The next request that matches reaches the server, and its answer is lost with the connection."""
        self._without_answer: set[socket.socket] = set()
        self.is_silent = False
        """Whether bytes are lost, as where a machine has vanished: nobody closes a connection."""
        self._target = target_port
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> Self:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restore(self) -> None:
        """Listen, on the same port as before."""
        if self._listener is not None:
            return
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def count(self, part: str) -> int:
        """Return how many requests have `part` in their method and path."""
        return sum(part in request for request in self.requests)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, requests: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if requests:
                    # A body never looks like a request line here, and a head comes in one piece on loopback.
                    lines = [f"{m[1].decode()} {m[2].decode()}" for m in _REQUEST_LINE.finditer(data)]
                    self.requests += lines
                    if self.refuse and any(re.search(self.refuse, line) for line in lines):
                        if self.answer:
                            head = f"HTTP/1.1 {self.answer} Refused\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                            source.sendall(head.encode())
                        break
                    if self.lose and any(re.search(self.lose, line) for line in lines):
                        self.lose = None
                        self._without_answer.add(source)
                elif sink in self._without_answer:
                    break
                if not self.is_silent:
                    sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()
        with self._lock:
            self._open.discard(source)


@contextlib.contextmanager
def through(server: PrefectServer) -> Iterator[Proxy]:
    """Make this process a client of a Prefect server by way of a proxy. Not to be left on a running event loop."""
    with Proxy(server.port) as proxy, environment({"PREFECT_API_URL": f"{proxy.url}/api"}):
        try:
            yield proxy
        finally:
            proxy.restore()
            drain()
