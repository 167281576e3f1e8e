"""A connection between the first process of a run and each other, which the system closes as soon as one is gone."""

import contextlib
import hmac
import selectors
import socket
import threading
import time
from collections.abc import Callable

HELLO = 10  # digits of a process' number
WELCOME = b"+"
BYE = b"."  # without this, the end of a connection is the end of the process
LOOK_EVERY = 0.5  # seconds, whether it is over
PATIENCE = 1.0  # seconds, for who connects and says nothing
JOINING = 60.0  # seconds, for the first to turn to a process that connects


class Peers:
    """Tells when a process is gone that didn't say `bye`: at once if it was killed, not if its machine lost power.

    Args:
        gone: called in a thread, with the number of the process.
    """

    def __init__(self, gone: Callable[[int], None]):
        self._gone = gone
        self._connections: list[socket.socket] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self, host: str, token: str) -> int:
        """In the first process: waits for the others in a thread.

        Args:
            host: an address of this machine; empty: all of them.
            token: what the others will say first; who says anything else is sent away.

        Returns:
            The port.

        Raises:
            OSError: the address isn't this machine's.
        """
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        server = socket.create_server((host, 0), family=family, backlog=1024, dualstack_ipv6=both)
        self._begin(self._serve, server, token.encode())
        return server.getsockname()[1]

    def connect(self, host: str, port: int, token: str, process: int) -> None:
        """In another: connects to the first, and waits in a thread for the end of that.

        Raises:
            OSError: it can't be reached.
        """
        connection = socket.create_connection((host, port), timeout=JOINING)
        connection.sendall(token.encode() + f"{process:{HELLO}}".encode())
        if _said(connection) != WELCOME:
            with connection, contextlib.suppress(OSError):
                connection.sendall(BYE)  # the first may come to read the hello yet
            raise ConnectionError(f"{host}:{port} doesn't know this process")
        _stay(connection)
        self._connections.append(connection)
        self._begin(self._heed, connection, 0)

    def bye(self) -> None:
        """Takes leave, so that the end of this process is no loss."""
        self._over.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(BYE)
                connection.shutdown(socket.SHUT_RDWR)
        if self._thread:
            self._thread.join()
        for connection in self._connections:
            with connection, contextlib.suppress(OSError):
                connection.sendall(BYE)  # to those that came meanwhile

    def close(self) -> None:
        """Lets the others know that this process is about to end."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def let_go(self, others: int, *, within: float) -> None:
        """After `close`, in the first process: waits until so many others have ended, or for so many seconds."""
        deadline = time.monotonic() + within
        connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.settimeout(max(0.0, deadline - time.monotonic()))
                _said(connection)
        if len(connections) < others:
            time.sleep(max(0.0, deadline - time.monotonic()))

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        self._thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._thread.start()

    def _serve(self, server: socket.socket, token: bytes) -> None:
        with server, selectors.DefaultSelector() as ready:
            ready.register(server, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in ready.select(LOOK_EVERY):
                    if key.fileobj is not server:
                        assert isinstance(key.fileobj, socket.socket)
                        ready.unregister(key.fileobj)
                        self._heed(key.fileobj, key.data)
                        continue
                    try:
                        connection, _ = server.accept()
                    except OSError:  # it is gone again, or there are too many files
                        time.sleep(LOOK_EVERY)
                        continue
                    process = _welcome(connection, token)
                    if process is None:
                        connection.close()
                    else:
                        self._connections.append(connection)
                        ready.register(connection, selectors.EVENT_READ, process)

    def _heed(self, connection: socket.socket, process: int) -> None:
        """Waits for the end of another process."""
        if _said(connection) != BYE and not self._over.is_set():
            self._gone(process)


def _welcome(connection: socket.socket, token: bytes) -> int | None:
    """The number of the process that connects, if it is one of the run."""
    try:
        said, deadline = b"", time.monotonic() + PATIENCE
        while len(said) < len(token) + HELLO:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if not (more := connection.recv(len(token) + HELLO - len(said))):
                return None
            said += more
        known, number = hmac.compare_digest(said[: len(token)], token), said[len(token) :].strip()
        if not known or not number.isdigit():
            return None
        connection.sendall(WELCOME)
        _stay(connection)
    except OSError:
        return None
    return int(number)


def _stay(connection: socket.socket) -> None:
    """Without a timeout, and never idle for so long that something on the way forgets it."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _said(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except OSError:
        return b""
