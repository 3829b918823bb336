"""TensorBoard's event files, written by hand: scalars need neither TensorFlow nor protobuf.

A file is a chain of records (TFRecord): length as uint64, its checksum, contents, their checksum. Contents are the
protobuf message `tensorflow.Event` (tensorflow/core/util/event.proto), encoded here field by field.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of a record: CRC-32C, rotated and shifted, as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def encode_event(step: int, scalars: Mapping[str, float], wall_time: float) -> bytes:
    """`Event(wall_time=1, step=2, summary=5: Summary(value=1: [Value(tag=1, simple_value=2)]))`."""
    values = b"".join(
        _bytes(1, _bytes(1, tag.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", value))
        for tag, value in scalars.items()
    )
    return struct.pack("<Bd", 1 << 3 | 1, wall_time) + _varint(2 << 3) + _varint(step) + _bytes(5, values)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)


class EventWriter:
    """Appends scalars to a new event file in `directory`; TensorBoard shows all files there as one run.

    Where steps are written again, after a resume, TensorBoard drops what it had of them: `restart_step` tells it so.
    """

    def __init__(self, directory: Path, restart_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.file = (directory / f"events.out.tfevents.{now:.6f}.train").open("ab")
        # Event(wall_time, file_version=3), then Event(wall_time, step, session_log=7: SessionLog(status=1: START)).
        header = struct.pack("<Bd", 1 << 3 | 1, now)
        self.file.write(_record(header + _bytes(3, b"brain.Event:2")))
        start = header + _varint(2 << 3) + _varint(restart_step) + _bytes(7, _varint(1 << 3) + _varint(1))
        self.file.write(_record(start))
        self.file.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.file.write(_record(encode_event(step, scalars, time.time())))
        self.file.flush()

    def close(self) -> None:
        self.file.close()
