"""Captions and boxes are read from COCO's own files and from JSON lines, or refused where they are wrong."""

import json
import os

import pytest

from llava_jax.console import InputError
from train.datasets.instruct.coco import Box, Record, read_records

IMAGES = [
    {"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480, "license": 3},
    {"id": 25, "file_name": "a/25.jpg", "width": 100, "height": 200},
    {"id": 30, "file_name": "30.jpg", "width": 10, "height": 10},
]
CAPTIONS = [
    {"image_id": 25, "id": 1, "caption": "A giraffe\nstands. "},
    {"image_id": 9, "id": 2, "caption": "Food on a plate."},
    {"image_id": 25, "id": 3, "caption": "A tall animal."},
]
OBJECTS = [
    {"image_id": 9, "category_id": 51, "bbox": [64.0, 48.0, 320.0, 96.12], "iscrowd": 0, "segmentation": [[1, 2]]},
    {"image_id": 25, "category_id": 3, "bbox": [-5, 100, 200, 150], "area": 1},
    {"image_id": 25, "category_id": 3, "bbox": [0, 0, 50, 50], "iscrowd": 1, "segmentation": {"counts": [1]}},
    {"image_id": 25, "category_id": 3, "bbox": [120, 0, 5, 5]},
    {"image_id": 25, "category_id": 3, "bbox": [10, 10, 0, 5]},
    {"image_id": 30, "category_id": 51, "bbox": [0, 0, 1, 1]},
]
CATEGORIES = [{"id": 51, "name": "bowl", "supercategory": "kitchen"}, {"id": 3, "name": "giraffe"}]
LINE = {"id": "7", "image": "7.jpg", "captions": ["A cat."], "instances": [{"category": "cat", "bbox": [0, 0.1, 1, 1]}]}


@pytest.fixture
def coco(tmp_path):
    """Write both files, changed; their paths."""

    def write(**changes):
        captions = {"info": {}, "images": IMAGES, "annotations": CAPTIONS} | changes.get("captions", {})
        boxes = {"images": IMAGES, "annotations": OBJECTS, "categories": CATEGORIES} | changes.get("boxes", {})
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        (tmp_path / "instances.json").write_text(json.dumps(boxes))
        return tmp_path / "captions.json", tmp_path / "instances.json"

    return write


def write_lines(tmp_path, *lines):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_coco(coco, capsys):
    captions, boxes = coco()
    bowl, giraffe = Box("bowl", (0.1, 0.1, 0.6, 0.3)), Box("giraffe", (0.0, 0.5, 1.0, 1.0))
    assert read_records(captions, boxes) == [
        Record("000000000009", "000000000009.jpg", ("Food on a plate.",), (bowl,)),
        Record("000000000025", "a/25.jpg", ("A giraffe stands.", "A tall animal."), (giraffe,)),
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"{boxes}: boxes left out: 1 of crowds",
        f"{boxes}: boxes left out: 2 without area in their image",
        f"{captions}: 1 image without captions left out",
    ]
    assert [record.boxes for record in read_records(captions)] == [(), ()]


def test_lines(tmp_path):
    path = write_lines(tmp_path, LINE, b"", {"id": 8, "image": "8.jpg", "source": "x"})
    assert read_records(path) == [
        Record("7", "7.jpg", ("A cat.",), (Box("cat", (0.0, 0.1, 1.0, 1.0)),)),
        Record("8", "8.jpg"),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_records(path)) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"captions": {"annotations": [*CAPTIONS, {"image_id": 25}]}}, "annotations[3].caption is missing"),
        ({"captions": {"annotations": [{"image_id": 26, "caption": ""}]}}, "captions.json: annotations[0]: no image"),
        ({"captions": {"images": [{"id": "9"}]}}, "captions.json: images[0].id: expected an integer, got a string"),
        ({"captions": {"images": [*IMAGES, IMAGES[0]]}}, "captions.json: id 000000000009 is there 2 times"),
        ({"captions": {"images": [IMAGES[0] | {"file_name": ""}, *IMAGES[1:]]}}, "images[0]: image '' is not"),
        ({"captions": {"annotations": []}}, "captions.json: has no images"),
        ({"captions": {"annotations": OBJECTS}}, "captions.json: annotations[0].caption is missing"),
        ({"boxes": {"annotations": CAPTIONS}}, "instances.json: annotations[0].category_id is missing"),
        ({"boxes": {"images": []}}, "instances.json: has none of the images with captions; are the files of the same"),
        ({"boxes": {"images": IMAGES[:1]}}, "instances.json: annotations[1]: no image has id 25"),
        ({"boxes": {"categories": CATEGORIES[:1]}}, "instances.json: annotations[1]: no category has id 3"),
        ({"boxes": {"annotations": [OBJECTS[0] | {"bbox": [1, 2, 3]}]}}, "annotations[0].bbox: expected a list"),
        ({"boxes": {"annotations": [OBJECTS[0] | {"bbox": [1, 2, -3, 4]}]}}, "annotations[0]: bbox [1.0, 2.0, "),
        ({"boxes": {"images": [IMAGES[0] | {"width": 0}, *IMAGES[1:]]}}, "annotations[0]: its image has 0 x"),
    ],
)  # fmt: skip
def test_coco_that_is_wrong(changes, says, coco):
    with pytest.raises(InputError) as refused:
        read_records(*coco(**changes))
    assert says in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 2: not JSON"),
        (b"[" * 10**5, "line 2: "),
        (b'{"id": "1", "image": "\xff"}', "line 2: not JSON"),
        (b'{"id": "1", "image": "\\ud800"}', "line 2: not JSON"),
        ({"id": "1"}, "line 2: image is missing"),
        ({"id": "1", "image": "a\0b"}, "line 2: image 'a\\x00b' is not a file name"),
        (LINE, "id 7 is there 2 times"),
        (LINE | {"id": "8", "instances": [{"category": "cat"}]}, "line 2: instances[0].bbox is missing"),
        (LINE | {"id": "8", "instances": [{"category": "cat", "bbox": [0, 0, 100, 80]}]}, "line 2: bbox [0.0, 0"),
        (LINE | {"id": "8", "instances": [{"category": "cat", "bbox": [0.5, 0, 0.4, 1]}]}, "must be left, top, right"),
    ],
)  # fmt: skip
def test_lines_that_are_wrong(line, says, tmp_path):
    with pytest.raises(InputError) as refused:
        read_records(write_lines(tmp_path, LINE, line))
    assert says in str(refused.value) and len(str(refused.value)) < 250


def test_files_that_are_none(coco, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path, says in (("none.json", "No such file"), ("pipe.json", "a pipe"), (".", "a directory")):
        with pytest.raises(InputError, match=says):
            read_records(tmp_path / path)
    with pytest.raises(InputError, match="http:// is not a supported object store"):
        read_records("http://a/b.json")
    with pytest.raises(InputError, match="leave out --boxes"):
        read_records(write_lines(tmp_path, LINE), coco()[1])
