"""A stand-in for the stream that decodes beside the sampling: it works only when its frames are waited for."""

from typing import ClassVar


class LateStream:
    """`log` tells what happened, in order. is_fast: whether frames arrive before they are waited for."""

    log: ClassVar = []
    is_fast = False

    def __init__(self, device):
        pass

    def start(self, decode, latents):
        self.log.append("put")
        return LateFrames(decode)

    def join(self):
        self.log.append("join")


class LateFrames:
    def __init__(self, decode):
        self.decode = decode

    def is_there(self):
        return LateStream.is_fast

    def wait(self):
        LateStream.log.append("frames")
        return self.decode()
