"""Files of pictures with 16 bits, as other programs write them and Pillow does not."""

from __future__ import annotations

import struct
import zlib

import numpy as np

COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by the number of channels
SHORT, LONG = 3, 4


def write_png(path, values, transparent=None):
    """A PNG of 16 bits: values are [H, W, C], 0 to 65535; C = 2 or 4 has opacity last."""
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPE[channels], 0, 0, 0)
    chunks = [(b"IHDR", head)]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(f">{channels}H", *transparent)))
    chunks.append((b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    chunks.append((b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        check = zlib.crc32(name + data)
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tiff(path, values, order="<", packed=False, in_planes=False, **tags):
    """A TIFF of values [H, W, C], with their type; `tags` are numbers t_NUMBER=VALUES."""
    height, width, channels = values.shape
    values = values.astype(values.dtype.newbyteorder(order))
    strips = [np.moveaxis(values, 2, 0)[k].tobytes() for k in range(channels)]
    strips = strips if in_planes else [values.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    fields = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [8 * values.dtype.itemsize] * channels),
        259: (SHORT, [8 if packed else 1]),
        262: (SHORT, [2 if channels > 2 else 1]),
        273: (LONG, [0] * len(strips)),
        277: (SHORT, [channels]),
        278: (LONG, [height]),
        279: (LONG, [len(strip) for strip in strips]),
        284: (SHORT, [2 if in_planes else 1]),
    }
    fields |= {int(name[2:]): (SHORT, given) for name, given in tags.items()}

    def packed_values(kind, given):
        return struct.pack(f"{order}{len(given)}{'H' if kind == SHORT else 'I'}", *given)

    # The strips come first, so that their places are known.
    content = b"".join(strips)
    ends = np.cumsum([8, *map(len, strips)])
    fields[273] = (LONG, ends[:-1].tolist())
    entries = b""
    for tag, (kind, given) in sorted(fields.items()):
        data = packed_values(kind, given)
        if len(data) > 4:
            place, content = 8 + len(content), content + data
            data = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, kind, len(given)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    directory = struct.pack(f"{order}H", len(fields)) + entries + bytes(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + content + directory)
