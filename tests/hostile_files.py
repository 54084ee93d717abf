"""Files that nobody should trust: valid ones with parts replaced, removed, renamed, repeated, cut off or flipped."""

import io
import json
import re
import signal
from contextlib import contextmanager

import torch
from hypothesis import strategies as st

# In the place of a value in JSON; raw texts, since most are no JSON of Python's own.
_VALUES = r"""
null true 0 -1 1 2 64 0.5 "" "a" "0" [] {} [[]] {"a":1} NaN -Infinity 1e999 1e-320 2147483648 6000000000
9223372036854775808 -9223372036854775808 18446744073709551616 "\ud800" "a\u0000b" "../../etc/passwd" "/etc/passwd"
[1,2] ["2",0] [0,[0,0]] [1,1] [0.9,0.5,0.0] [0,4611686018427387904] "F4" "I64" "BOOL" "C64"
"""
TEXTS = [*_VALUES.split(), "9" * 300, "9" * 5000, f'"{"x" * 300}"', f"[{'0,' * 3000}0]", "[" * 100_000]
TEXTS += ["[" * 90 + "]" * 90, "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000]
NAMES = ("", "a", "a.b", "x" * 2000, "0", "blocks.999999999.modulation", "\ud800", "a\0", "__metadata__", "." * 900)
CODES = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int64: "I64"}
CODES |= {torch.bool: "BOOL", torch.complex64: "C64"}
KINDS = ("replace", "replace", "replace", "remove", "rename", "repeat", "cut", "flip")


def edits():
    """One to four edits, (what, where, value), from four bytes each: hypothesis draws bytes fastest.

    `where` picks a place of the document, whatever its size, and `value` a replacement from a list of any length.
    """
    return st.binary(min_size=4, max_size=16).map(
        lambda drawn: [
            (KINDS[drawn[i] % len(KINDS)], drawn[i + 1] << 8 | drawn[i + 2], drawn[i + 3])
            for i in range(0, len(drawn) - 3, 4)
        ]
    )


def places(document):
    """(container, key) of everything in nested dicts and lists."""
    found, todo = [], [document]
    for one in todo:
        keys = list(one) if isinstance(one, dict) else range(len(one))
        found += [(one, key) for key in keys]
        todo += [one[key] for key in keys if isinstance(one[key], dict | list)]
    return found


def edited(document, changes, values):
    """`document`, changed in its place by the edits of its contents."""
    found = places(document)
    for kind, where, value in changes:
        container, key = found[where % len(found)]
        if kind in ("cut", "flip") or (key not in container if isinstance(container, dict) else key >= len(container)):
            continue
        if kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[NAMES[value % len(NAMES)]] = container.pop(key)
        elif kind == "repeat":
            container[key] = [container[key]] * 3
        else:
            container[key] = values[value % len(values)]
    return document


def damaged(contents, changes):
    """The bytes after the edits of bytes."""
    for kind, where, value in changes:
        place = where % max(1, len(contents))
        if kind == "cut":
            contents = contents[:place]
        elif kind == "flip":
            contents = contents[:place] + bytes([value]) + contents[place + 1 :]
    return contents


def as_json(document, changes):
    """A document as JSON with some values of TEXTS."""
    document = json.loads(json.dumps(document))
    marks = [f"@{number}@" for number in range(len(TEXTS))]
    text = json.dumps(edited(document, changes, marks))
    return re.sub('"@(\\d+)@"', lambda match: TEXTS[int(match[1])], text)


def as_safetensors(tensors, metadata, changes):
    """A safetensors file; `where` decides whether an edit is of its header, of JSON in the metadata, or of a tensor."""
    inner = {key: json.loads(text) for key, text in metadata.items() if text[:1] in "[{"}
    group = [[change for change in changes if change[1] % 3 == part] for part in range(3)]
    metadata = metadata | {key: as_json(value, group[0]) for key, value in inner.items()}
    tensors = edited(dict(tensors), group[1], ODD_TENSORS)
    tensors = {name: value for name, value in tensors.items() if is_plain(value)}
    header, data, end = {"__metadata__": metadata} if metadata else {}, [], 0
    for name, value in tensors.items():
        data.append(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets, end = [end, end + len(data[-1])], end + len(data[-1])
        name = name.encode(errors="replace").decode()
        header[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
    text = as_json(header, group[2]).encode()
    return damaged(len(text).to_bytes(8, "little") + text + b"".join(data), changes)


def as_torch(stored, changes):
    """A file of torch.save, its dicts and tensors edited."""
    stored = edited(
        {key: dict(value) if isinstance(value, dict) else value for key, value in stored.items()}, changes, ODD
    )
    buffer = io.BytesIO()
    torch.save(stored, buffer, _use_new_zipfile_serialization=changes[0][1] % 4 > 0)
    return damaged(buffer.getvalue(), changes)


def is_plain(value):
    """Whether safetensors can hold a value, in a small file."""
    if not isinstance(value, torch.Tensor) or value.dtype not in CODES or value.numel() > 1e6:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


ODD_TENSORS = [torch.zeros(shape) for shape in ((), 0, 3, 100_000, (1, 1), (4, 0), (100_000, 1), (0, 5, 7), (1,) * 10)]
ODD_TENSORS += [torch.full((4, 4), float("nan")), torch.full((1, 16, 3, 4, 4), float("inf"))]
ODD_TENSORS += [torch.zeros(4, 4, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8)]
ODD_TENSORS += [torch.tensor(12_000_000_000), torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)]
ODD_TENSORS += [torch.zeros(()).expand(1_000_000_000), torch.zeros(1).expand(100_000, 100_000)]
ODD_TENSORS += [torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta")]
ODD = [*ODD_TENSORS, None, 7, 2**70, "text", [1, 2], {0: torch.zeros(1)}, {"a": {1: 2}}, {"a": torch.zeros(2)}, {}]


class TooSlow(BaseException):
    """A reader that takes longer than it may; no reader can catch it as an Exception."""


@contextmanager
def at_most(seconds):
    """Raise TooSlow after so many seconds of this process's own time, which a busy machine does not shorten."""

    def stop(*_):
        raise TooSlow

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
