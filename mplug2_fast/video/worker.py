"""A decoding process, and the class by which its parent controls it.

The process is a new Python, not a fork, so that it does not inherit threads and locks. It does not import the parent's
main module, so a script needs no `if __name__ == "__main__"`. It imports only numpy and PyAV, so that replacing it is
cheap.

Messages are packets on a socket. The parent sends a job, then requests each further clip. The worker answers with JSON
and, for a clip, a file descriptor of anonymous memory with the frames. That memory is freed when the last descriptor is
closed, even if a process crashes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any

import numpy as np

from mplug2_fast.errors import VideoError
from mplug2_fast.video.clips import ClipOptions, DecodedClip, clips_of
from mplug2_fast.video.limits import LimitError, too_much_memory

_NEXT = b"N"
_JOB, _JOB_IN_MEMORY = b"P", b"M"
_DYING_LIMIT = 5.0
_MAX_MESSAGE = 1 << 16
_MAX_REASON = 1 << 12
# The part of a worker's memory that the system's limit on data does not count: libraries, and frames that are sent.
_SHARED_BYTES = 1 << 27


class Worker:
    """The parent's control of a worker process. Creating it starts the process."""

    def __init__(self, options: ClipOptions) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from mplug2_fast.video.worker import main; "
            f"main({theirs.fileno()}, {os.getpid()}, {pickle.dumps(options)!r})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Otherwise numpy starts a thread for every core; they are not used, but stay active for a while.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, source: bytes | str | os.PathLike[str]) -> None:
        """Starts a file: a path, or the bytes of the file. The answer is its first clip, or an error.

        With windows, starting a file ends the current one.

        Raises:
            ConnectionError: the process has ended. BlockingIOError: it has not started the previous file.
            OSError: the file's name, or its bytes, are too large.
        """
        if isinstance(source, bytes):
            memory = os.memfd_create("video")
            try:
                with open(memory, "wb", closefd=False) as file:
                    file.write(source)
                socket.send_fds(self.socket, [_JOB_IN_MEMORY], [memory], socket.MSG_DONTWAIT)
            finally:
                os.close(memory)
        else:
            self.socket.send(_JOB + os.fsencode(source), socket.MSG_DONTWAIT)

    def proceed(self) -> None:
        """Requests the next clip of the file."""
        self.socket.send(_NEXT)

    def receive(self) -> dict[str, Any] | None:
        """The next answer, with a buffer `memory` if it has frames; None if the process has ended."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self.socket, _MAX_MESSAGE, 1)
        except ConnectionResetError:  # raised once if the process left a message unread; its answers follow
            return self.receive()
        if not message:
            return None
        answer = json.loads(message)
        for descriptor in descriptors:
            answer["memory"] = mmap.mmap(descriptor, 0)
            os.close(descriptor)
        return answer

    def end(self) -> str:
        """Kills the process if it still runs, and returns how it ended."""
        self.socket.close()
        self._process.kill()
        try:
            status = self._process.wait(_DYING_LIMIT)
        except subprocess.TimeoutExpired:  # it waits for a disk or a network, and will end afterwards
            return "it cannot be killed"
        if status >= 0:
            return f"it ended with status {status}"
        name = signal.Signals(-status).name
        return f"{name}, as when memory runs out" if -status == signal.SIGKILL else name


def main(descriptor: int, parent: int, pickled: bytes) -> None:
    """Serves one parent until that ends."""
    connection = socket.socket(fileno=descriptor)
    _set_up_signals(parent)
    warnings.simplefilter("ignore")  # Pillow warns of large images, and of damage that it then reports as an error
    try:
        options: ClipOptions = pickle.loads(pickled)
        if options.limits.memory is not None:
            most = max(options.limits.memory - _SHARED_BYTES, _SHARED_BYTES)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        import mplug2_fast.video.decode  # noqa: F401  (so that importing does not slow down or fail the first file)
    except Exception:
        connection.send(json.dumps({"failed": traceback.format_exc()[-_MAX_REASON:]}).encode())
        return
    with contextlib.suppress(ConnectionError, EOFError):  # the parent has ended
        _serve(connection, options)


def _set_up_signals(parent: int) -> None:
    """Ends with the parent, ignores Ctrl-C, and is killed first when the machine runs out of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")
    except OSError:
        pass  # some sandboxes do not have this file


def _serve(connection: socket.socket, options: ClipOptions) -> None:
    connection.send(b"{}")
    message, descriptors = _receive(connection)
    while True:
        path = message[1:] if message[:1] == _JOB else f"/proc/self/fd/{descriptors[0]}".encode()
        message, following = _run_job(connection, path, options)
        for descriptor in descriptors:
            os.close(descriptor)
        descriptors = following


def _run_job(connection: socket.socket, path: bytes, options: ClipOptions) -> tuple[bytes, list[int]]:
    """Sends the clips of a file on request. Returns the first message that is not such a request."""
    name = os.fsdecode(path)
    started = time.monotonic()
    try:
        for clip in clips_of(name, options):
            _send_clip(connection, clip, time.monotonic() - started)
            message, descriptors = _receive(connection)
            if message != _NEXT:
                return message, descriptors
            started = time.monotonic()
    except ConnectionError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and options.limits.memory is not None:
            error = too_much_memory(options.limits.memory)
        is_expected = isinstance(error, (VideoError, LimitError))
        reason = str(error) if is_expected else f"{type(error).__name__}: {error}"
        reason = reason.removeprefix(f"{name}: ".replace("\n", " "))
        answer = {"error": reason[:_MAX_REASON], "seconds": time.monotonic() - started}
        connection.send(json.dumps(answer).encode())
    return _receive(connection)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 1)
    if not message:
        raise EOFError
    return message, descriptors


def _send_clip(connection: socket.socket, clip: DecodedClip, seconds: float) -> None:
    """Sends the frames, followed by their indices, in shared memory."""
    shape = (len(clip.frames), *clip.frames[0].shape)
    indices = np.array(clip.indices, dtype=np.int64)
    size = int(np.prod(shape))
    descriptor = os.memfd_create("clip")
    try:
        os.ftruncate(descriptor, size + indices.nbytes)
        with mmap.mmap(descriptor, 0) as memory:
            pixels = np.frombuffer(memory, np.uint8, size).reshape(shape)
            np.stack(clip.frames, out=pixels)
            memory[size:] = indices.tobytes()
            del pixels  # a view keeps the memory from being closed
        answer = {
            "shape": shape,
            "window": clip.window,
            "last": clip.last,
            "backend": clip.backend,
            "size": clip.size,
            "seconds": seconds,
        }
        socket.send_fds(connection, [json.dumps(answer).encode()], [descriptor])
    finally:
        os.close(descriptor)
