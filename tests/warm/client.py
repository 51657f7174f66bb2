"""Asks the server for a process, and stands for it: its output, its end and its status are this one's."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM)


def main(folder: str, python: str, *arguments: str) -> None:
    """Be `python *arguments`: `-m` and `-c` by the server, all else as an ordinary process."""
    asked = arguments[1:] if arguments[:1] == ("-u",) else arguments
    if asked[:1] not in (("-m",), ("-c",)):
        os.execv(python, [python, *arguments])
    status = _ask(f"{folder}/socket", {"python": f"{folder}/python", "arguments": asked})
    if status < 0:  # it was ended by a signal, and so is this
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _ask(address: str, request: dict[str, object]) -> int:
    request |= {"folder": os.getcwd(), "variables": dict(os.environ)}  # noqa: PTH109
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        for each in FORWARDED:
            signal.signal(each, lambda number, _: connection.sendall(bytes([number])))
        return int(connection.recv(8) or 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
