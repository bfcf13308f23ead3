"""Decoding in a child process with limits: a decoder that crashes, hangs or eats memory costs one file.

Both ends of the pipe stand here. torch is imported where it is used: the child starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.errors import HostError
from cascade.media.decoding import frames_of
from cascade.media.pixels import Unreadable

if TYPE_CHECKING:
    from torch import Tensor


def serve(descriptor: int, memory: int) -> None:
    """Answers decode requests on a pipe until it closes: the child of `Decoder`.

    A request is JSON: path, fps, cover, seconds, cpu (seconds). The answer is JSON: shape, times and rate, and then
    the frames' bytes; or reason. A decoder that crashes, spins or grows beyond `memory` (bytes) ends this process only.
    """
    import resource

    import av  # noqa: F401  (before the limit, and before the parent's clock runs)

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(descriptor)
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + request["cpu"])
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            frames, times, rate = frames_of(
                Path(request["path"]), request["fps"], request["cover"], request["seconds"], 2**31
            )
        except Unreadable as error:
            pipe.send_bytes(json.dumps({"reason": error.reason}).encode())
        except MemoryError:
            pipe.send_bytes(json.dumps({"reason": "decoder_oom"}).encode())
        else:
            pipe.send_bytes(json.dumps({"shape": frames.shape, "times": times, "rate": rate}).encode())
            pipe.send_bytes(frames.data.cast("B"))


class Decoder:
    """`serve` in a child with limits on memory, processor and waiting time; started anew when it dies."""

    def __init__(self, timeout: float, memory: float) -> None:
        """`timeout` in seconds for one file, `memory` in GiB of address space."""
        self.timeout, self.memory = timeout, memory
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def decode(self, path: Path, cover: tuple[int, int], fps: float, seconds: float) -> tuple[Tensor, str]:
        """Frames (F, H, W, 3) uint8 at `fps`, covering `cover` (height, width), and no reason; or none and why."""
        import torch

        if self._child is None:
            self._start()
        request = {"path": str(path.absolute()), "fps": fps, "cover": cover, "seconds": seconds, "cpu": self.timeout}
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            if not self._pipe.poll(self.timeout):
                self._stop()
                return torch.empty(0), "decoder_hang"
            answer = json.loads(self._pipe.recv_bytes())
            if "reason" in answer:
                return torch.empty(0), answer["reason"]
            data = bytearray(self._pipe.recv_bytes())
            return torch.frombuffer(data, dtype=torch.uint8).view(answer["shape"]), ""
        except (EOFError, ConnectionError):
            status = self._stop()
            return torch.empty(0), "decoder_hang" if status == -signal.SIGXCPU else "decoder_crash"

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs, tempfile.TemporaryFile() as errors:
            self._child = subprocess.Popen(
                _command(theirs.fileno(), round(self.memory * 2**30)),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the parent, which stops the child
            )
            theirs.close()
            self._pipe = ours
            try:
                ready = ours.poll(60) and ours.recv_bytes() == b"ready"
            except (EOFError, ConnectionError):
                ready = False
            if not ready:
                status = self._stop()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                raise HostError(
                    f"video decoder: did not start (exit status {status}: {lines[-1]})", fix="a larger memory="
                )

    def _stop(self) -> int | None:
        """Ends the child; its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.kill()
        return child.wait()


def _command(descriptor: int, memory: int) -> list[str]:
    """Starts `serve` with our own import path, whatever the environment or the working directory hold by now."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom cascade.media.child import serve; serve({descriptor}, {memory})"
    )
    return [sys.executable, "-I", "-c", code]
