"""The metrics of a run: shares of a chip's peak, and the events that TensorBoard reads."""

import struct
from pathlib import Path

import pytest

from llava_jax.config import tiny
from train import tensorboard
from train.config import TrainConfig
from train.metrics import MetricsFiles, device_peak, flops_of_batch
from training import read_metrics


def test_peak_share():
    """Of one layer, by hand; six operations a weight and position where it is trained, four where it is not."""
    assert [device_peak(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "cpu")] == [
        197e12,
        459e12,
        918e12,
        None,
    ]
    model = tiny(merge="flat", aspect_ratio="pad")
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v, o, feed-forward, of two layers
    attention = 2 * 2 * 4 * 8 * 3 * 100**2  # forward
    tower = 2 * 2 * 3 * 5 * 17 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 4 * 16 * 3 * 5 * 17 * 17
    got = flops_of_batch(model, TrainConfig(), rows=3, length=100, tiles=5)
    assert got == 6 * weights * 300 + 3 * attention + tower
    got = flops_of_batch(model, TrainConfig(tune="projector"), rows=3, length=100, tiles=5)
    assert got == 4 * weights * 300 + 3 * attention + tower


def read_records(path: Path) -> list[bytes]:
    data, records = path.read_bytes(), []
    while data:
        (n,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == tensorboard.masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + n : 16 + n])[0] == tensorboard.masked_crc32c(data[12 : 12 + n])
        records.append(data[12 : 12 + n])
        data = data[16 + n :]
    return records


def parse_message(data: bytes) -> list[tuple[int, object]]:
    """Fields of a protobuf message: (number, value); bytes where it has a length."""

    def varint():
        nonlocal data
        n = shift = 0
        while True:
            byte, data = data[0], data[1:]
            n, shift = n | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return n

    fields = []
    while data:
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        elif kind == 2:
            n = varint()
            value, data = data[:n], data[n:]
        else:
            n, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), data = struct.unpack(code, data[:n]), data[n:]
        fields.append((number, value))
    return fields


def test_tensorboard_events_say_what_the_metrics_say(finished):
    output, _ = finished
    [file] = (output / "events").iterdir()
    version, start, *events = (dict(parse_message(record)) for record in read_records(file))
    assert (version[3], start[2], start[7]) == (b"brain.Event:2", 1, b"\x08\x01")
    for event, line in zip(events, read_metrics(output), strict=True):
        assert event[2] == line["step"]
        values = [dict(parse_message(value)) for _, value in parse_message(event[5])]
        got = {value[1].decode(): value[2] for value in values}
        assert got == {name: pytest.approx(value, rel=1e-6) for name, value in line.items() if name != "step"}


def test_events_are_whole_whatever_the_clock_says(monkeypatch, tmp_path):
    """It is the one place that asks for the time of day; all that waits or saves asks how much of it has passed."""
    times = iter([1e9, 2e9, -5.0, 0.0, 4e9, 1e9, 1e9])
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    for first in (1, 3):
        events = tensorboard.EventWriter(tmp_path, first)
        for number in (first, first + 1):
            events.write(number, {"loss": 1.0})
        events.close()
    steps = [dict(parse_message(record)).get(2) for path in tmp_path.iterdir() for record in read_records(path)]
    assert sorted(filter(None, steps)) == [1, 1, 2, 3, 3, 4]


def test_crc32c():
    """RFC 3720, B.4, masked as TFRecord does."""
    crc = 0x8A9136AA  # of 32 zero bytes
    assert tensorboard.masked_crc32c(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_metrics_on_a_full_disk_end_no_run(capsys, tmp_path):
    files = MetricsFiles(tmp_path, 0)
    files.file = open("/dev/full", "a")  # noqa: SIM115
    for i in (1, 2):
        files.write({"step": i, "loss": 1.0})
    files.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics cannot be written (No space left on device); the run goes on" in err
    assert list((tmp_path / "events").iterdir())
