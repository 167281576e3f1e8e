"""The end of a connection tells of the end of a process, unless that took leave; strangers tell nothing."""

import queue
import socket
import time

import pytest

from jaxlm.peers import BYE, HELLO, WELCOME, Peers

TOKEN = "3f" * 32
WAIT = 30.0  # seconds, which an answer may take


def listening() -> tuple[Peers, int, "queue.Queue[int]"]:
    gone = queue.Queue[int]()
    first = Peers(gone.put)
    return first, first.listen("127.0.0.1", TOKEN), gone


def hello(port: int, text: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    connection.sendall(text.encode())
    return connection


def test_the_first_hears_of_each_end_that_is_no_leave() -> None:
    first, port, gone = listening()
    others = {process: hello(port, f"{TOKEN}{process:{HELLO}}") for process in (1, 2, 3, 70_000)}
    others[2].sendall(BYE)
    for process in (2, 3, 1, 70_000):
        others[process].close()
        if process != 2:
            assert gone.get(timeout=WAIT) == process
    assert gone.empty()
    first.bye()


def test_the_others_hear_of_the_end_of_the_first_but_not_if_it_took_leave() -> None:
    for leave in (False, True):
        first, port, _ = listening()
        gone = queue.Queue[int]()
        other = Peers(gone.put)
        other.connect("127.0.0.1", port, TOKEN, 1)
        while not first._connections:
            pass
        if leave:
            first.bye()
            with pytest.raises(queue.Empty):
                gone.get(timeout=0.3)
        else:
            first.close()
            assert gone.get(timeout=WAIT) == 0
        other.bye()


def test_strangers_are_sent_away_and_nothing_is_made_of_their_end() -> None:
    first, port, gone = listening()
    for said in (
        "",
        "GET / HTTP/1.1\r\n\r\n",
        f"{'00' * 32}{1:{HELLO}}",
        TOKEN,
        f"{TOKEN}        -1",
        f"{TOKEN}other one!",
    ):
        with hello(port, said) as stranger:
            if len(said) < len(TOKEN) + HELLO:
                stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    hello(port, f"{TOKEN}{4:{HELLO}}").close()
    assert gone.get(timeout=WAIT) == 4
    assert gone.empty()
    first.bye()


def test_the_first_lets_the_others_end_before_it() -> None:
    first, port, _ = listening()
    other = hello(port, f"{TOKEN}{1:{HELLO}}")
    while not first._connections:
        pass
    other.close()
    first.close()
    begun = time.monotonic()
    first.let_go(1, within=WAIT)
    assert time.monotonic() - begun < WAIT / 2
    first.let_go(2, within=0.01)


def test_who_is_not_known_has_no_connection() -> None:
    first, port, gone = listening()
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} doesn't know this process"):
        Peers(gone.put).connect("127.0.0.1", port, "00" * 32, 1)
    assert gone.empty()
    first.bye()


def test_a_stranger_that_says_nothing_keeps_nobody_waiting_for_long() -> None:
    first, port, gone = listening()
    with hello(port, ""):
        other = Peers(gone.put)
        other.connect("127.0.0.1", port, TOKEN, 1)
    other.bye()
    first.bye()
    assert gone.empty()


def test_a_hello_may_come_in_pieces_and_from_any_address() -> None:
    gone = queue.Queue[int]()
    first = Peers(gone.put)
    with hello(first.listen("", TOKEN), TOKEN[:9]) as connection:
        for rest in (TOKEN[9:], f"{5:{HELLO}}"):
            connection.sendall(rest.encode())
        assert connection.recv(1) == WELCOME
    assert gone.get(timeout=WAIT) == 5
    first.bye()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        Peers(lambda _: None).listen("192.0.2.1", TOKEN)
