"""A row of the data file becomes a sample, or a reason why it cannot be one."""

import base64
from urllib.parse import quote

import numpy as np
import pytest

from helpers import turns
from llava_jax.data.splice import IGNORE, IMAGE
from train.samples import BadSample, Samples
from training import BROKEN, MESSAGES, PHOTO, parts


@pytest.mark.parametrize("line", BROKEN)
def test_what_is_wrong_with_a_sample(line, write, folder, models):
    samples = Samples(write([line], "data.jsonl"), str(folder), *models["v1.6-mistral"])
    found = samples.measure(0)
    found = found if isinstance(found, BadSample) else samples.load(found)
    assert BROKEN[line] in found.reason
    assert found.describe().startswith(f"{samples.path} row 0")
    about_image = any(
        text in found.reason
        for text in ("image folder", "no such", "broken", "not an", "cannot be", "unsupported size", "URL", "host")
    )
    assert bool(found.file) == (about_image or "a directory" in found.reason)


def test_a_conversation_is_the_same_in_every_format(write, folder, models):
    """Ids, labels and tiles of `messages`, of parts, of `images` and of a system message, wherever they stand."""
    data = "data:image/png;base64," + base64.b64encode((folder / "0.png").read_bytes()).decode()
    image, question = {"type": "image"}, {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": "x"}
    said = turns("<image>\nWhat?", "x")
    one = [
        {"image": "0.png", "conversations": said},
        {"image": ["0.png"], "conversations": turns("What?<image>", "x")},
        {"images": "0.png", "conversations": [{"role": "user", "content": "<image>\nWhat?"}, answer]},
        {"images": ["0.png"], "image": None, "messages": said, "system": "", "tools": "", "videos": []},
        {"image": "0.png", "conversations": said, "video": False, "audio": 0, "tools": None, "chosen": False},
        {"image": "0.png", "messages": [{"role": "user", "content": "What?<image>", "video": False}, answer]},
        {"images": ["0.png"], "messages": [parts(image, question), parts({"type": "text", "text": "x"}, role="gpt")]},
        {"messages": [parts(question, image | {"path": "0.png"}), answer | {"weight": 1}]},
        {"messages": [parts(image | {"url": str(folder / "0.png")}, question), answer]},
        {"messages": [parts({"type": "image_url", "image_url": {"url": data}}, question), answer]},
        {"messages": [parts({"type": "image_url", "image_url": f"file://{folder}/0.png"}, question), answer]},
        {"image": data, "conversations": said},
        {"image": "data:;base64," + quote(data.split(",")[1]), "conversations": said},
        {"image": "DATA:image/png," + quote((folder / "0.png").read_bytes()), "conversations": said},
        {"image": f"file://localhost{folder}/%30.png", "conversations": said},
    ]
    two = [
        {"image": ["1.png", "2.png"], "conversations": turns("<image>\n<image>\nWhat?", "x")},
        {"images": ["1.png", "2.png"], "messages": [parts(image, image, question), answer]},
        {
            "images": ["2.png", "1.png"],
            "messages": [parts(image | {"index": 1}, image | {"index": 0}, question), answer],
        },
        {"messages": [parts(image | {"image": "1.png"}, image | {"image": "2.png"}, question), answer]},
        {"images": ["1.png", "2.png"], "messages": [parts(image, image | {"index": None}, question), answer]},
    ]
    told = [
        {"system": "Be brief.", "conversations": turns("a", "x")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("a", "x")]},
        {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        {"messages": [parts({"type": "text", "text": "Be brief."}, role="System"), *MESSAGES]},
    ]
    for rows in (one, two, told):
        samples = Samples(write(rows), str(folder), *models["v1.6-mistral"], template="llava_llama_2")
        found = [samples.load(samples.measure(i)) for i in range(len(rows))]
        assert samples.has_image.tolist() == [rows is not told] * len(rows)
        assert samples.max_images == len(found[0].tiles)
        for row in found:
            np.testing.assert_array_equal(row.ids, found[0].ids)
            np.testing.assert_array_equal(row.labels, found[0].labels)
            assert [tile.tobytes() for tile in row.tiles] == [tile.tobytes() for tile in found[0].tiles]


def test_a_system_message_replaces_the_templates(write, folder, models):
    model, tokenizer = models["v1.5-llama"]
    rows = [{"system": "Be brief.", "conversations": turns("a", "the")}, {"conversations": turns("a", "the")}]
    for template in ("v1", "llava_v0", "llava_llama_2", "mistral_instruct"):
        samples = Samples(write(rows), str(folder), model, tokenizer, template=template)
        own, other = (samples.load(samples.measure(i)) for i in (0, 1))
        text = tokenizer.decode(own.ids, special=True)
        assert "Be brief." in text and "artificial" not in text and "helpful" not in text
        assert tokenizer.decode(own.ids[own.labels != IGNORE]) == tokenizer.decode(other.ids[other.labels != IGNORE])


def test_plain_has_no_place_for_a_system_message_and_says_so_once(write, folder, models, capsys):
    rows = [PHOTO | {"conversations": turns("<image>", "x")}, PHOTO | {"conversations": turns("<image>", "x")}]
    path = write([row | {"system": "Be brief."} for row in rows])
    samples = Samples(path, str(folder), *models["v1.5-llama"], template="plain")
    [plain] = [Samples(write(rows, "b.json"), str(folder), *models["v1.5-llama"], template="plain").measure(0)]
    np.testing.assert_array_equal(samples.measure(1).encoded.ids, plain.encoded.ids)
    says = f"warning: {path}: the template plain has no place for its system messages\n"
    assert capsys.readouterr().err == says


def test_keys_that_nobody_knows_are_named_once(write, folder, models, capsys):
    known = {"id": 1, "model": "x", "source": "y", "kinds": ["z"], "conversations": turns("a", "x"), "video": []}
    odd = [known, known | {"bbox": [1]}, known | {"bbox": [2], "k" * 300: 1}]
    odd.append({"messages": [parts({"type": "text", "text": "a", "fps": 3}), MESSAGES[1] | {"mood": "good"}]})
    path = write(odd)
    Samples(path, str(folder), *models["v1.5-llama"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: {path}: key 'bbox' is ignored (first in row 1)",
        f"warning: {path}: key '{'k' * 24}...{'k' * 13}' is ignored (first in row 2)",
        f"warning: {path}: key 'fps' of a part is ignored (first in row 3)",
        f"warning: {path}: key 'mood' of a turn is ignored (first in row 3)",
    ]
    Samples(write([known | {f"key{i}": 1 for i in range(15)}]), str(folder), *models["v1.5-llama"])
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[-1]) == (11, f"warning: {path}: 5 other keys are ignored too")


@pytest.mark.parametrize("follow", [False, True])
def test_absolute_paths_in_the_image_folder_are_taken(write, folder, models, tmp_path, follow):
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub").mkdir(exist_ok=True)
    names = [
        f"{folder}/0.png",
        f"{tmp_path}/link/0.png",
        f"file://{folder}/0.png",
        f"{folder}/sub/../0.png",
        "/etc/passwd",
    ]
    path = write([{"image": name, "conversations": turns("<image>", "x")} for name in names])
    for place, taken in ((folder, 3), (tmp_path / "link", 3), ("/", 3), (folder / "sub", 0)):
        samples = Samples(path, str(place), *models["v1.6-mistral"], follow_links=follow)
        found = [samples.measure(i) for i in range(4)]
        assert [isinstance(one, BadSample) for one in found] == [i >= taken for i in range(4)], place
        assert all("is outside the image folder" in one.reason for one in found[taken:])
        if place != "/":
            assert "is outside the image folder" in samples.measure(4).reason


def test_an_image_is_at_fault_by_name(write, folder, models):
    rows = [{"id": 9, "image": ["0.png", "truncated.jpg"], "conversations": turns("<image><image>", "x")}]
    samples = Samples(write(rows), str(folder), *models["v1.5-llama"])
    found = samples.load(samples.measure(0))
    assert (found.id, found.file) == (9, "truncated.jpg")
    assert found.describe() == f"{samples.path} row 0 (id 9): {folder}/truncated.jpg: {found.reason.split(': ')[1]}"


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_links_are_followed_within_the_image_folder(name, write, folder, models, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "pictures2").mkdir()
    for place in (pictures, tmp_path, tmp_path / "pictures2"):
        (place / "0.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "link").symlink_to(pictures)
    for link, target in {
        "same.png": "0.png", "whole.png": str(pictures / "0.png"), "through.png": str(tmp_path / "link" / "0.png"),
        "here": ".", "out.png": "../0.png", "beside": "../pictures2", "up": "..", "two.png": "out.png",
        "loop.png": "loop.png", "gone.png": "missing.png",
    }.items():  # fmt: skip
        (pictures / link).symlink_to(target)
    wanted = {"0.png": None, "same.png": None, "whole.png": None, "through.png": None, "here/0.png": None} | {
        "here/out.png": "is outside the image folder, through a link to",
        "out.png": f"out.png: is outside the image folder, through a link to {tmp_path.resolve()}/0.png",
        "beside/0.png": "is outside the image folder",
        "up/pictures2/0.png": "is outside the image folder",
        "two.png": "is outside the image folder",
        "loop.png": "cannot be read",
        "gone.png": "no such image",
    }
    path = write([{"image": image, "conversations": turns("<image>", "x")} for image in wanted])
    for directory in (pictures, tmp_path / "link"):
        samples = Samples(path, str(directory), *models[name], template="v1")
        for i, (image, says) in enumerate(wanted.items()):
            found = samples.measure(i)
            found = found if isinstance(found, BadSample) else samples.load(found)
            if says is None:
                assert found.tile_count, image
            else:
                assert (found.file, says in found.reason) == (image, True), found
    samples = Samples(path, str(pictures), *models[name], template="v1", follow_links=True)
    for i, (image, says) in enumerate(wanted.items()):
        found = samples.measure(i)
        found = found if isinstance(found, BadSample) else samples.load(found)
        assert isinstance(found, BadSample) == (image in ("loop.png", "gone.png")), (image, says)


def test_a_long_conversation_is_truncated_and_images_behind_its_end_are_forgotten(write, folder, models):
    model, tokenizer = models["v1.5-llama"]
    row = {"image": ["0.png", "missing.png"], "conversations": turns("<image> a", "the", "b <image>", "is")}
    path = write([row])
    whole = Samples(path, str(folder), model, tokenizer, template="llava_llama_2").measure(0)
    for room in (whole.length, whole.length - 1, whole.length - 25, 60):
        samples = Samples(path, str(folder), model, tokenizer, template="plain", max_length=room)
        assert isinstance(samples.measure(0), BadSample)
        samples = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=room)
        cut = samples.measure(0)
        if isinstance(cut, BadSample):
            assert cut.reason == f"no answer within {room} positions"
            continue
        assert (cut.length, cut.truncated) == (min(room, whole.length), max(0, whole.length - room))
        assert cut.tiles == len(cut.layouts) == (cut.encoded.ids[: cut.ids] == IMAGE).sum()
    answer = int(np.flatnonzero(whole.encoded.labels != IGNORE)[0])
    before = answer + 15  # positions before it: 16 features for one mark
    short = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=before + 2)
    cut = short.measure(0)
    assert (len(cut.layouts), cut.length) == (1, before + 2)
    assert (short.load(cut).labels != IGNORE).sum() == 2
    assert short.load(cut).tile_count == 1
    too_short = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=before)
    assert too_short.measure(0).reason == f"no answer within {before} positions"


def test_random_order_of_image_and_question(write, folder, models):
    path = write([{"image": "0.png", "conversations": turns("<image>\nWhat?", "x")}] * 40)

    def places(seed, epoch):
        samples = Samples(path, str(folder), *models["v1.5-llama"], template="v1", image_first="random", seed=seed)
        np.random.seed(epoch)  # of no importance
        return [int(np.flatnonzero(samples.measure(i, epoch).encoded.ids == IMAGE)[0]) for i in range(40)]

    first = places(0, 0)
    assert len(set(first)) == 2
    assert 8 < first.count(min(first)) < 32
    assert places(0, 0) == first
    assert places(0, 1) != first != places(1, 0)
    as_is = Samples(path, str(folder), *models["v1.5-llama"], template="v1").measure(0)
    assert int(np.flatnonzero(as_is.encoded.ids == IMAGE)[0]) == min(first)
